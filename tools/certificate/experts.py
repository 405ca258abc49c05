"""The routers of the float64 reference: replayed choices, balance losses and loads, one response after another."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from dapo_mcore.config import MoeConfig
from dapo_mcore.types import TrainBatch


@dataclass(frozen=True)
class Routed:
    """What one router did with the T tokens of one response."""

    logits: Tensor  # [T, experts]
    own: Tensor  # [T, top_k]: the largest logits
    used: Tensor  # [T, top_k]


@dataclass
class Routers:
    """Takes the routers of a Hugging Face model over; the model must see the responses of `batch` one by one."""

    model: transformers.PreTrainedModel
    batch: TrainBatch
    moe: MoeConfig
    layers: dict[int, list[Routed]] = field(default_factory=dict)  # layer -> response after response

    def __post_init__(self) -> None:
        decoder: Any = self.model.get_decoder()
        for layer, block in enumerate(decoder.layers):
            if hasattr(block.mlp, "gate"):
                self.layers[layer] = []
                block.mlp.gate.forward = partial(self._route, block.mlp.gate, layer)

    def _route(self, gate: Any, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden.reshape(-1, gate.hidden_dim), gate.weight)
        used = own = logits.topk(gate.top_k, -1).indices
        if self.moe.router_replay:
            assert self.batch.routes is not None
            totals = (self.batch.prompt_lengths + self.batch.response_lengths).tolist()
            used = self.batch.routes.long().split(totals)[len(self.layers[layer])][:, layer]
        self.layers[layer].append(Routed(logits, own, used))
        weights = logits.softmax(-1).gather(-1, used)
        is_normalised = getattr(gate, "norm_topk_prob", True)  # Qwen3-VL's always are
        return logits, weights / weights.sum(-1, keepdim=True) if is_normalised else weights, used

    def losses(self) -> tuple[Tensor, Tensor]:
        """Sums over layers: mean over responses of the sequence-wise balance loss, mean over tokens of the z-loss."""
        zero = torch.zeros((), dtype=torch.float64)
        every = [routed for responses in self.layers.values() for routed in responses]
        aux = sum((_balance(routed) for routed in every), zero) / len(self.batch)
        z = sum((torch.logsumexp(r.logits, -1).pow(2).sum() for r in every), zero) / len(self.batch.token_ids)
        return aux, z

    def loss(self) -> Tensor:
        aux, z = self.losses()
        return self.moe.seq_aux_loss_coeff * aux + self.moe.z_loss_coeff * z

    def metrics(self) -> dict[str, float]:
        """By the actor's names; {} for a dense model."""
        if not self.layers:
            return {}
        loads = []
        for responses in self.layers.values():
            experts = responses[0].logits.shape[-1]
            load = torch.bincount(torch.cat([r.used.flatten() for r in responses]), minlength=experts).double()
            loads.append(load / load.mean())
        relative = torch.stack(loads)
        found = {"moe/load_max_over_mean": relative.max().item(), "moe/load_min_over_mean": relative.min().item()}
        aux, z = (loss.item() / len(self.layers) for loss in self.losses())
        if self.moe.seq_aux_loss_coeff:
            found["moe/aux_loss"] = aux
        if self.moe.z_loss_coeff:
            found["moe/z_loss"] = z
        if self.moe.router_replay:
            found["moe/replay_changed_fraction"] = self._changed()
        return found

    def _changed(self) -> float:
        every = [r for responses in self.layers.values() for r in responses]
        changed = [set(a) != set(b) for r in every for a, b in zip(r.own.tolist(), r.used.tolist(), strict=True)]
        return sum(changed) / len(changed)


def _balance(routed: Routed) -> Tensor:
    """DeepSeek-V3, arXiv:2412.19437, eq. 17-20 for one response, without the coefficient."""
    length, experts = routed.logits.shape
    top_k = routed.own.shape[-1]
    total = torch.zeros((), dtype=torch.float64)
    for expert in range(experts):
        f = experts / (top_k * length) * (routed.own == expert).sum()
        total = total + f * routed.logits.softmax(-1)[:, expert].mean()
    return total


def random_routes(batch: TrainBatch, layers: int, experts: int, top_k: int) -> Tensor:
    """[L, layers, top_k] uint8: different experts for each token and layer."""
    draw = torch.Generator().manual_seed(len(batch.token_ids))
    scores = torch.rand(len(batch.token_ids), layers, experts, generator=draw)
    return scores.topk(top_k).indices.to(torch.uint8)
