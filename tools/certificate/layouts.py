"""The layouts the certificate covers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dapo_mcore.config import MegatronConfig, Recompute

DENSE, TIED, MOE = "qwen3", "qwen3_tied", "qwen3_moe"
SEEING_DENSE, SEEING_MOE = SEEING = ("qwen3_vl", "qwen3_vl_moe")
OF_EXPERTS = (MOE, SEEING_MOE)
SHORT = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "sp": "sequence_parallel",
}


# Not of the layout, but tried with one: whether kernels are fused, as Megatron's options are called.
FUSIONS = (
    "use_fused_rmsnorm",
    "use_fused_swiglu",
    "moe_grouped_gemm",
    "moe_permute_fusion",
    "apply_rope_fusion",
)
SWITCHES = ("sp", *FUSIONS)


@dataclass(frozen=True)
class Layout:
    name: str
    world: int  # processes
    megatron: MegatronConfig
    families: tuple[str, ...]  # of reference.FAMILIES
    sizes: Mapping[str, int] = field(default_factory=dict)  # of the model, where the layout needs others


def megatron_config(**sizes: Any) -> MegatronConfig:
    """By the short names above or by Megatron's; without distributed optimizer unless it is asked for."""
    options = {SHORT.get(key, key): value for key, value in sizes.items()}
    return MegatronConfig(**{"use_distributed_optimizer": False, **options})


def parse(text: str, world: int) -> Layout:
    """A layout of a command line, e.g. tp=2,sp=1,pp=2,ep=4; what is left of the `world` is data parallel.

    It may name fusions, too: moe_permute_fusion=1.

    Raises:
        ValueError: a name or a size is none.
    """
    names, sizes = (*SHORT, *FUSIONS), dict[str, Any]()
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in names or not size.isdecimal() or (int(size) < 1 and name not in SWITCHES):
            raise ValueError(f"--layout {text}: {part!r} is not one of {'=N, '.join(names)}=N; e.g. tp=2,sp=1,pp=2")
        sizes[name] = bool(int(size)) if name in SWITCHES else int(size)
    config = megatron_config(**sizes, use_distributed_optimizer=True)
    dense_fits = config.expert_model_parallel_size == config.expert_tensor_parallel_size == 1
    moe_fits = config.tensor_model_parallel_size == 1 or config.sequence_parallel
    families = (*((DENSE, TIED, SEEING_DENSE) if dense_fits else ()), *(OF_EXPERTS if moe_fits else ()))
    if config.apply_rope_fusion:  # refused for rotary embeddings in several dimensions
        families = tuple(family for family in families if family not in SEEING)
    return Layout(text or "DP", world, config, families, model_sizes(config))


def model_sizes(config: MegatronConfig) -> dict[str, int]:
    """The smallest that a layout can divide, from those of the reference's models up."""
    chunks = config.pipeline_model_parallel_size * config.virtual_pipeline_model_parallel_size
    return {
        "num_hidden_layers": chunks * -(-2 // chunks),
        "num_attention_heads": max(4, config.tensor_model_parallel_size),
        "num_experts": max(8, config.expert_model_parallel_size),
    }


def _row(name: str, world: int, families: Sequence[str], **options: Any) -> Layout:
    config = megatron_config(**options)
    seeing = (SEEING_MOE,) if name in SEEING_LAYOUTS else ()
    return Layout(name, world, config, (*families, *seeing), model_sizes(config))


OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
BOTH = (DENSE, MOE)
SEEING_LAYOUTS = ("single, recompute full", "DP2, overlap", "TP2+SP", "PP2", "CP2", "EP2", "CP2xEP2, overlap")
LAYOUTS = (
    _row("single", 1, BOTH),
    _row("single, recompute full", 1, BOTH, recompute=Recompute.full),
    _row("DP2", 2, BOTH),
    _row("DP2, distributed optimizer", 2, BOTH, use_distributed_optimizer=True),
    _row("DP2, overlap", 2, BOTH, **OVERLAP),
    _row("TP2", 2, (DENSE, TIED, SEEING_DENSE), tp=2),
    _row("TP2+SP", 2, BOTH, tp=2, sp=True),
    _row("PP2", 2, (DENSE, TIED, MOE), pp=2),
    _row("PP2xVPP2", 2, (DENSE, TIED, MOE), pp=2, vpp=2),
    _row("PP2xVPP2, recompute full", 2, (MOE,), pp=2, vpp=2, recompute=Recompute.full),
    _row("CP2", 2, BOTH, cp=2),
    _row("EP2", 2, (MOE,), ep=2),
    _row("ETP2", 2, (MOE,), tp=2, sp=True, etp=2),
    _row("DP2xETP2", 2, (MOE,), etp=2, use_distributed_optimizer=True),
    _row("TP2xEP2", 2, (MOE,), tp=2, sp=True, ep=2),
    _row("CP2xEP2, overlap", 2, (MOE,), cp=2, ep=2, **OVERLAP),
    _row("DP4", 4, BOTH),
    _row("EP4", 4, (MOE,), ep=4),
    _row("DP2xEP2", 4, (MOE,), ep=2),
    _row("TP2xEP2xETP2", 4, (MOE,), tp=2, sp=True, ep=2, etp=2),
    _row("TP2xPP2", 4, (TIED,), tp=2, pp=2),
    _row("TP2+SPxPP2", 4, (TIED, MOE), tp=2, sp=True, pp=2),
    _row("TP2xCP2", 4, (DENSE,), tp=2, cp=2),
    _row("TP2+SPxCP2", 4, (*BOTH, SEEING_MOE), tp=2, sp=True, cp=2),
    _row("PP2xCP2", 4, (DENSE, TIED), pp=2, cp=2),
    _row("PP2xCP2xEP2", 4, (MOE,), pp=2, cp=2, ep=2),
    _row("DP2xPP2xVPP2, overlap", 4, BOTH, pp=2, vpp=2, **OVERLAP),
)
