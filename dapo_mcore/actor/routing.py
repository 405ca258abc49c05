"""All routers of the policy: what they are told about each micro-batch, and what they did.

Everything depends on whole responses alone, so that the cut over ranks and micro-batches does not change the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from dapo_mcore.actor.packing import MicroBatch, Origin
from dapo_mcore.actor.policy_model import PolicyModel
from dapo_mcore.actor.routed_layer import COUNTERS, LocalTokens, RoutedLayer
from dapo_mcore.actor.router_losses import Weights
from dapo_mcore.config import MoeConfig
from dapo_mcore.observe.metrics import Ratio
from dapo_mcore.platform import platform


class RouterReplayError(RuntimeError):
    """Replay is on, but a router chose experts by itself, or replayed nothing."""


class Routing:
    """The routers of this rank's chunks; empty for a model without experts."""

    def __init__(self, chunks: Sequence[PolicyModel], config: TransformerConfig, moe: MoeConfig) -> None:
        self._config, self._moe = config, moe
        self._layers: list[RoutedLayer] = []
        has_losses = bool(moe.seq_aux_loss_coeff or moe.z_loss_coeff)
        for chunk in chunks if config.num_moe_experts else ():
            routers = [module for module in chunk.modules() if isinstance(module, TopKRouter)]
            layers = [RoutedLayer(r, replays=moe.router_replay, has_losses=has_losses) for r in routers]
            chunk.register_forward_pre_hook(partial(self._announce, layers))
            self._layers += layers

    def finish(self) -> dict[str, Ratio]:
        """What the routers of all ranks did since the last call. Collective.

        Raises:
            RouterReplayError: on every rank, when replay is on and not every choice was replayed.
        """
        if not self._config.num_moe_experts:
            return {}
        totals = self._totals()
        for layer in self._layers:
            layer.restart()
        if self._moe.router_replay:
            refuse_native_choices(totals)
        return routing_metrics(totals, self._moe)

    def _announce(self, layers: Sequence[RoutedLayer], chunk: PolicyModel, args: tuple[MicroBatch, Any]) -> None:
        tokens = self._local_tokens(args[0].origin)
        for layer in layers:
            layer.announce(tokens)

    def _local_tokens(self, origin: Origin) -> LocalTokens:
        """Under sequence parallelism this rank's part of them."""
        part = slice(None)
        if self._config.sequence_parallel:
            size = len(origin.response) // self._config.tensor_model_parallel_size
            start = parallel_state.get_tensor_model_parallel_rank() * size
            part = slice(start, start + size)
        return LocalTokens(
            response=origin.response[part],
            lengths=origin.lengths,
            routes=None if origin.routes is None else origin.routes[part],
            weights=Weights(
                aux=self._moe.seq_aux_loss_coeff,
                z=self._moe.z_loss_coeff,
                per_response=1.0 / origin.batch_responses,
                per_token=1.0 / origin.batch_tokens,
            ),
        )

    def _totals(self) -> dict[int, dict[str, Tensor]]:
        """Layer with experts -> "load" [experts] and every counter [], summed over all ranks. Collective."""
        experts = cast(int, self._config.num_moe_experts)
        sums = torch.zeros(self._config.num_layers, experts + len(COUNTERS) + 1, dtype=torch.float64)
        for layer in self._layers:
            counted = [layer.load.cpu(), *(layer.counters[name].double().cpu()[None] for name in COUNTERS)]
            sums[layer.index] = torch.cat([*counted, torch.ones(1)])  # the last marks a layer that has experts
        sums = sums.to(platform().device)
        dist.all_reduce(sums, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
        dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
        return {
            index: {"load": row[:experts], **dict(zip(COUNTERS, row[experts:-1], strict=True))}
            for index, row in enumerate(sums.cpu())
            if row[-1] > 0
        }


def refuse_native_choices(totals: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Raises RouterReplayError naming the layers whose routers did not replay every choice."""
    counts = {index: (int(row["replayed"]), int(row["native"])) for index, row in totals.items()}
    wrong = {index: pair for index, pair in counts.items() if pair[0] == 0 or pair[1] > 0}
    if wrong:
        told = ", ".join(f"layer {i}: {replayed} replayed, {native} native" for i, (replayed, native) in wrong.items())
        raise RouterReplayError(
            f"actor.moe.router_replay=true, but not every choice of an expert was replayed ({told}): the responses "
            "came without the choices of the rollout, or another model computes than was given them; set it to false "
            "to train with the policy's own choices"
        )


def routing_metrics(totals: Mapping[int, Mapping[str, Tensor]], moe: MoeConfig) -> dict[str, Ratio]:
    """Shares of the layer that is worst off, and means over layers."""
    loads = torch.stack([row["load"] for row in totals.values()])
    metrics = {}
    if loads.sum() > 0:  # an update, not a scoring pass
        relative = loads / loads.mean(1, keepdim=True)
        metrics["moe/load_max_over_mean"] = Ratio(relative.max().item(), 1)
        metrics["moe/load_min_over_mean"] = Ratio(relative.min().item(), 1)
        losses = {"aux_loss": moe.seq_aux_loss_coeff, "z_loss": moe.z_loss_coeff}
        for name in (name for name, coefficient in losses.items() if coefficient):
            metrics[f"moe/{name}"] = Ratio(sum(row[name].item() for row in totals.values()), len(totals))
    if moe.router_replay:
        changed, replayed = (sum(row[name].item() for row in totals.values()) for name in ("changed", "replayed"))
        metrics["moe/replay_changed_fraction"] = Ratio(changed, replayed)
    return metrics
