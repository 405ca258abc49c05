"""Which rank holds which part of which parameter, while training under Megatron and while sampling with vLLM."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cache
from typing import TypeAlias

from dapo_mcore.config import MegatronConfig, RolloutConfig
from dapo_mcore.weights.names import Parameter
from dapo_mcore.weights.sections import Stage

Holders: TypeAlias = tuple[tuple[int, ...], ...]  # for each part of a parameter the ranks that hold it, ascending


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainLayout:
    """Megatron's groups over `ranks` processes, in the order of its `parallel_state`: for experts etp varies fastest,
    then ep, data parallel, pp; for everything else tp, cp, data parallel, pp. ValueError for sizes that do not fit.
    """

    ranks: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1  # chunks of layers per stage
    cp: int = 1
    ep: int = 1
    etp: int = 1

    def __post_init__(self) -> None:
        _check("train", asdict(self), ("tp", "cp", "pp"), ("etp", "ep", "pp"))

    @staticmethod
    def of(megatron: MegatronConfig, ranks: int) -> TrainLayout:
        """As the options say."""
        return TrainLayout(
            ranks=ranks,
            tp=megatron.tensor_model_parallel_size,
            pp=megatron.pipeline_model_parallel_size,
            vpp=megatron.virtual_pipeline_model_parallel_size,
            cp=megatron.context_parallel_size,
            ep=megatron.expert_model_parallel_size,
            etp=megatron.expert_tensor_parallel_size,
        )

    def parts(self, parameter: Parameter) -> int:
        """Into how many parts a parameter, or each of its experts, is cut; rank r holds part r modulo that."""
        size = self.etp if parameter.row.is_expert else self.tp
        return size if parameter.layout.is_cut else 1

    def experts(self, rank: int, count: int) -> range:
        """Those of `count` experts that a rank holds, in each mixture of experts of its stage."""
        local = count // self.ep
        first = rank // self.etp % self.ep * local
        return range(first, first + local)

    def ranks_of(self, parameter: Parameter, layers: int) -> range:
        """The pipeline stage that holds a parameter of a model with `layers` decoder layers."""
        match parameter.section.stage:
            case Stage.FIRST:
                stage = 0
            case Stage.LAST:
                stage = self.pp - 1
            case Stage.LAYER:
                stage = parameter.layer // (layers // (self.pp * self.vpp)) % self.pp
        each = self.ranks // self.pp
        return range(stage * each, (stage + 1) * each)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutLayout:
    """vLLM engines over `ranks` processes: `tp` consecutive ranks are one engine, `ep` consecutive ranks share the
    experts. With ep=1 every engine cuts each expert over its tp ranks; an `ep` above tp is attention under data
    parallelism. ValueError for sizes that do not fit.
    """

    ranks: int
    tp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        _check("rollout", asdict(self), ("tp",), ("ep",))
        if self.ep > 1 and self.ep % self.tp:
            raise ValueError(
                f"rollout ep={self.ep}: whole experts are spread over the tp={self.tp} ranks of an engine or over "
                f"several engines; use ep={self.tp}, a multiple of it, or ep=1, which cuts every expert over tp"
            )

    @staticmethod
    def of(rollout: RolloutConfig, ranks: int) -> RolloutLayout:
        """Of engines in the trainer's processes, as the options say."""
        size = rollout.tensor_model_parallel_size
        return RolloutLayout(ranks=ranks, tp=size, ep=size if rollout.enable_expert_parallel else 1)

    def parts(self, parameter: Parameter) -> int:
        """Into how many parts a parameter, or each of its experts, is cut; rank r holds part r modulo that."""
        if not parameter.layout.is_cut or (parameter.row.is_expert and self.ep > 1):
            return 1
        return self.tp

    def experts(self, rank: int, count: int) -> range:
        """Those of `count` experts that a rank holds: vLLM's linear placement, where the first ranks hold one more if
        there are no equal shares."""
        each, more = divmod(count, self.ep)
        index = rank % self.ep
        first = index * each + min(index, more)
        return range(first, first + each + (index < more))

    def ranks_of(self, parameter: Parameter, layers: int) -> range:
        """Every engine has all layers."""
        return range(self.ranks)


Layout: TypeAlias = TrainLayout | RolloutLayout


def holders(layout: Layout, parameter: Parameter, expert: int, layers: int) -> Holders:
    """Who holds the parts of a parameter, or of one of its experts (-1: it has none)."""
    ranks = layout.ranks_of(parameter, layers)
    return _holders(layout, ranks, layout.parts(parameter), expert, parameter.experts)


@cache
def _holders(layout: Layout, ranks: range, parts: int, expert: int, experts: int) -> Holders:
    having = [rank for rank in ranks if expert < 0 or expert in layout.experts(rank, experts)]
    return tuple(tuple(rank for rank in having if rank % parts == part) for part in range(parts))


def _check(side: str, sizes: dict[str, int], *products: tuple[str, ...]) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{side} {name}={size}: a number of ranks or chunks; use at least 1")
    ranks = sizes["ranks"]
    for names in products:
        product = math.prod(sizes[name] for name in names)
        if ranks % product:
            told = " x ".join(f"{name}={sizes[name]}" for name in names)
            raise ValueError(
                f"{side} {told}: {product} does not divide the {ranks} ranks; choose sizes whose product does, or use "
                f"{-(-ranks // product) * product} ranks"
            )
