"""One router of a mixture-of-experts policy: replays choices, adds balance losses, counts what it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from dapo_mcore.actor.router_losses import Weights, balance_terms, with_loss

COUNTERS = ("replayed", "native", "changed", "aux_loss", "z_loss")  # beside the tokens per expert


@dataclass(frozen=True, slots=True)
class LocalTokens:
    """Those T tokens of a micro-batch that the routers of this rank see, padding included."""

    response: Tensor  # [T] int64: number of its response within the micro-batch; `len(lengths)`: padding
    lengths: Tensor  # [responses] int64: tokens of each, on all ranks together
    routes: Tensor | None  # [T, layers, top_k] int64: experts to use; None: unknown
    weights: Weights  # of the losses

    @property
    def is_real(self) -> Tensor:
        """[T] bool: False for padding."""
        return self.response < len(self.lengths)


class RoutedLayer:
    """Wraps a router in place; with replay it sits where Megatron's RouterReplay would."""

    def __init__(self, router: TopKRouter, *, replays: bool, has_losses: bool) -> None:
        self.index = cast(int, router.layer_number) - 1  # among all layers of the model
        self._router = router
        self._latest: LocalTokens
        self._awaiting_gradients: list[LocalTokens] = []
        self._now: LocalTokens
        self.restart()
        router.register_forward_pre_hook(self._take)
        router.register_forward_hook(self._count)
        if replays:
            router.router_replay = cast(Any, self)
        if has_losses:
            self._gating = router.gating
            router.gating = self._gate  # type: ignore[method-assign]

    def restart(self) -> None:
        """Count anew."""
        self.counters: dict[str, Tensor] = {name: torch.zeros((), dtype=torch.float64) for name in COUNTERS}
        self.load = torch.zeros(cast(int, self._router.num_experts), dtype=torch.float64)

    def announce(self, tokens: LocalTokens) -> None:
        """The next forward of the model is of these tokens."""
        self._latest = tokens
        if torch.is_grad_enabled():
            self._awaiting_gradients.append(tokens)

    def _take(self, router: TopKRouter, args: Any) -> None:
        """Find out which micro-batch this call is of.

        Recomputation runs a forward without gradients, and again with them in the backward: then of the oldest
        micro-batch that had none yet, whatever was announced in between (1F1B).
        """
        self._now = self._awaiting_gradients.pop(0) if torch.is_grad_enabled() else self._latest

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, compute_topk: Any
    ) -> tuple[Tensor, Tensor]:
        """Megatron's seam: of scores [T, experts], those of the experts to use and their numbers, [T, top_k] each.

        Only the choice is replayed: the scores are the policy's own, and the router learns.
        """
        own_scores, own = compute_topk(scores, topk, num_groups, group_topk)
        real = self._now.is_real
        if self._now.routes is None:
            self._add("native", real.sum())
            return own_scores, own
        chosen = self._now.routes[:, self.index]
        self._add("replayed", real.sum())
        self._add("changed", (real & (own.sort(1).values != chosen.sort(1).values).any(1)).sum())
        return scores.gather(1, chosen), chosen

    def _gate(self, hidden: Tensor) -> Tensor:
        logits = self._gating(hidden)
        if not torch.is_grad_enabled():
            return logits
        tokens, router = self._now, self._router
        aux, z = balance_terms(logits.flatten(0, -2), tokens.response, tokens.lengths, router.topk, router.tp_cp_group)
        self._add("aux_loss", aux.detach() * tokens.weights.per_response)
        self._add("z_loss", z.detach() * tokens.weights.per_token)
        return with_loss(logits, tokens.weights.total(aux, z))

    def _count(self, router: TopKRouter, args: Any, output: tuple[Tensor, Tensor]) -> None:
        if torch.is_grad_enabled():  # once per token and update, recomputed or not
            self.load = self.load.to(output[1].device) + output[1][self._now.is_real].sum(0)

    def _add(self, counter: str, value: Tensor) -> None:
        self.counters[counter] = self.counters[counter].to(value.device) + value
