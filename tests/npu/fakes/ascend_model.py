"""A mixture of experts that lies in memory as vllm-ascend's do, small enough to be computed by hand.

Loading layout w13 [E, 2I, H], w2 [E, H, I]; runtime layout transposed. Shapes cannot tell the layouts of a square
matrix apart, so that every expert parameter says which one it is in, and who uses it wrongly is told.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

EXPERTS, VOCAB, TOP_K = 4, 24, 2
LOADABLE, RUNTIME = "loadable", "runtime"
SHARDS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


class Violation(AssertionError):
    """Somebody used the engine as the real one must not be used."""


def demand(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Violation(otherwise)


def expert_parameter(data: Tensor, order: str, **attributes: Any) -> nn.Parameter:
    parameter = nn.Parameter(data, requires_grad=False)
    for name, value in {"order": order, **attributes}.items():
        setattr(parameter, name, value)
    return parameter


class Transposing(QuantizeMethodBase):
    """Brings experts into the runtime layout. `keeps_loaders`: as releases after 0.23 do."""

    def __init__(self, keeps_loaders: bool) -> None:
        self.keeps_loaders = keeps_loaders

    def create_weights(self, layer: nn.Module, *sizes: Any, **attributes: Any) -> None:
        raise NotImplementedError

    def apply(self, layer: nn.Module, *arguments: Any, **options: Any) -> Tensor:
        raise NotImplementedError

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        for name in ("w13_weight", "w2_weight"):
            old: Any = getattr(layer, name)
            demand(old.order == LOADABLE, f"{name} was post-processed twice, or without having been loaded")
            kept = {"weight_loader": old.weight_loader} if self.keeps_loaders else {}
            setattr(layer, name, expert_parameter(old.data.transpose(1, 2).contiguous(), RUNTIME, **kept))


class Experts(nn.Module):
    def __init__(self, hidden: int, width: int, keeps_loaders: bool) -> None:
        super().__init__()
        self.width = width
        self.quant_method = Transposing(keeps_loaders)
        loader = {"weight_loader": self.weight_loader}
        self.w13_weight = expert_parameter(torch.zeros(EXPERTS, 2 * width, hidden), LOADABLE, **loader)
        self.w2_weight = expert_parameter(torch.zeros(EXPERTS, hidden, width), LOADABLE, **loader)

    def weight_loader(self, param: Any, loaded_weight: Tensor, weight_name: str, shard_id: str, expert_id: int) -> None:
        demand(param.order == LOADABLE, f"{weight_name} was loaded into experts in their runtime layout")
        half = slice(self.width, None) if shard_id == "w3" else slice(self.width)
        (param.data[expert_id] if shard_id == "w2" else param.data[expert_id, half]).copy_(loaded_weight)

    def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """[hidden] -> [hidden]: the weighted sum of the chosen experts."""
        for name, parameter in self.named_parameters():
            known: Any = parameter
            demand(known.order == RUNTIME, f"{name} was not in its runtime layout when the engine sampled")
            demand(parameter.is_contiguous(), f"{name} is strided, which the grouped product does not take")
        total = torch.zeros_like(x)
        for expert, share in zip(chosen.tolist(), shares, strict=True):
            gate, up = (x @ self.w13_weight[expert]).split(self.width)
            total += share * ((nn.functional.silu(gate) * up) @ self.w2_weight[expert])
        return total


class Mlp(nn.Module):
    def __init__(self, hidden: int, width: int, keeps_loaders: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, EXPERTS, bias=False)
        self.experts = Experts(hidden, width, keeps_loaders)


class MoeModel(nn.Module):
    """Embedding, one layer of experts, head; weights come under Hugging Face's names."""

    def __init__(self, hidden: int, width: int, keeps_loaders: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, hidden)
        self.mlp = Mlp(hidden, width, keeps_loaders)
        self.head = nn.Linear(hidden, VOCAB, bias=False)
        self.requires_grad_(False)
        record_metadata_for_reloading(self)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        parameters: dict[str, Any] = dict(self.named_parameters())
        loaded = set()
        for name, tensor in weights:
            prefix, is_expert, rest = name.partition("experts.")
            if not is_expert:
                getattr(parameters[name], "weight_loader", default_weight_loader)(parameters[name], tensor)
                loaded.add(name)
                continue
            expert, projection, _ = rest.split(".")
            target = f"{prefix}experts.{'w2' if projection == 'down_proj' else 'w13'}_weight"
            demand(hasattr(parameters[target], "weight_loader"), f"{target} has no weight_loader")
            parameters[target].weight_loader(parameters[target], tensor, name, SHARDS[projection], int(expert))
            loaded.add(target)
        return loaded

    def next_logprobs(self, hidden: Tensor) -> Tensor:
        """[hidden] -> [vocabulary]."""
        shares, chosen = self.mlp.gate(hidden).softmax(-1).topk(TOP_K)
        return self.head(hidden + self.mlp.experts(hidden, chosen, shares)).log_softmax(-1)


def random_weights(seed: int, hidden: int, width: int) -> dict[str, Tensor]:
    """A checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (VOCAB, hidden), "mlp.gate.weight": (EXPERTS, hidden), "head.weight": (VOCAB, hidden)}
    for expert in range(EXPERTS):
        shapes |= {f"mlp.experts.{expert}.{name}.weight": (width, hidden) for name in ("gate_proj", "up_proj")}
        shapes[f"mlp.experts.{expert}.down_proj.weight"] = (hidden, width)
    return {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def expected_logprobs(weights: dict[str, Tensor], prompt: tuple[int, ...], picture: int) -> Tensor:
    """[vocabulary] float64: what `MoeEngine.sample` gives, from the checkpoint alone."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = w["embed.weight"][[*prompt, picture]].sum(0)
    shares, chosen = (w["mlp.gate.weight"] @ x).softmax(-1).topk(TOP_K)
    y = x.clone()
    for share, expert in zip(shares, chosen.tolist(), strict=True):
        gate, up, down = (w[f"mlp.experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        y += share * (down @ (nn.functional.silu(gate @ x) * (up @ x)))
    return (w["head.weight"] @ y).log_softmax(-1)
