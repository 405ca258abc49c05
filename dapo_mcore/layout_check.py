"""Refuses layouts that Megatron cannot run, or that do not fit the processes or the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dapo_mcore.config import MegatronConfig, RolloutBackend, RolloutConfig
from dapo_mcore.refuse import refuse

TENSOR = "actor.megatron.tensor_model_parallel_size"
PIPELINE = "actor.megatron.pipeline_model_parallel_size"
VIRTUAL = "actor.megatron.virtual_pipeline_model_parallel_size"
EXPERT = "actor.megatron.expert_model_parallel_size"
EXPERT_TENSOR = "actor.megatron.expert_tensor_parallel_size"


def check_world(megatron: MegatronConfig, rollout: RolloutConfig, world_size: int) -> None:
    """What the options and the number of processes say; ValueError."""
    _check_combinations(megatron)
    tp, pp, cp = (
        megatron.tensor_model_parallel_size,
        megatron.pipeline_model_parallel_size,
        megatron.context_parallel_size,
    )
    if world_size % (tp * pp * cp):
        others = f"times pipeline_model_parallel_size={pp} times context_parallel_size={cp} " if pp * cp > 1 else ""
        refuse(TENSOR, tp, f"{others}does not divide the {world_size} processes",
               f"start a multiple of {tp * pp * cp} processes")  # fmt: skip
    ep, etp = megatron.expert_model_parallel_size, megatron.expert_tensor_parallel_size
    if world_size % (ep * etp * pp):
        stages = f" times pipeline_model_parallel_size={pp}" if pp > 1 else ""
        refuse(EXPERT, ep, f"times expert_tensor_parallel_size={etp}{stages} does not divide the {world_size} "
               "processes", f"start a multiple of {ep * etp * pp} processes")  # fmt: skip
    if rollout.backend is RolloutBackend.colocated and world_size % rollout.tensor_model_parallel_size:
        refuse("rollout.tensor_model_parallel_size", rollout.tensor_model_parallel_size,
               f"does not divide the {world_size} processes", "each engine takes that many ranks")  # fmt: skip


def _check_combinations(megatron: MegatronConfig) -> None:
    vpp = megatron.virtual_pipeline_model_parallel_size
    if vpp > 1 and megatron.pipeline_model_parallel_size == 1:
        refuse(VIRTUAL, vpp, "interleaves the chunks of several pipeline stages, and there is one",
               "set it to 1, or raise pipeline_model_parallel_size")  # fmt: skip
    if megatron.sequence_parallel and megatron.tensor_model_parallel_size == 1:
        refuse("actor.megatron.sequence_parallel", True, "needs tensor_model_parallel_size above 1", "set it to false")
    if megatron.overlap_param_gather and not (megatron.use_distributed_optimizer and megatron.overlap_grad_reduce):
        refuse("actor.megatron.overlap_param_gather", True, "parameters are only gathered with "
               "use_distributed_optimizer, and Megatron overlaps that only with overlap_grad_reduce",
               "set both to true, or this to false")  # fmt: skip


def check_model_fits(megatron: MegatronConfig, rollout: RolloutConfig, model: Mapping[str, Any]) -> None:
    """What the model's config.json says; ValueError."""
    for option, tp in (
        (TENSOR, megatron.tensor_model_parallel_size),
        ("rollout.tensor_model_parallel_size", rollout.tensor_model_parallel_size),
    ):
        _check_heads(option, tp, model)
    _check_width(TENSOR, megatron.tensor_model_parallel_size, model, "intermediate_size")
    _check_layers(megatron, model)
    _check_experts(megatron, model)
    rope = model.get("rope_parameters") or model.get("rope_scaling") or {}
    if megatron.apply_rope_fusion and rope.get("mrope_section"):
        refuse("actor.megatron.apply_rope_fusion", True, "fused kernels know one dimension of positions, and the "
               f"model's mrope_section is {rope['mrope_section']}", "set it to false")  # fmt: skip


def _check_heads(option: str, tp: int, model: Mapping[str, Any]) -> None:
    heads = model.get("num_attention_heads")
    if heads and heads % tp:
        refuse(option, tp, f"does not divide the model's {heads} attention heads", f"use one of {_divisors(heads)}")
    groups = model.get("num_key_value_heads") or heads
    if groups and groups % tp and tp % groups:
        refuse(option, tp, f"neither divides nor is a multiple of the model's {groups} KV heads", f"use {groups}")


def _check_layers(megatron: MegatronConfig, model: Mapping[str, Any]) -> None:
    layers, pp = model.get("num_hidden_layers"), megatron.pipeline_model_parallel_size
    vpp = megatron.virtual_pipeline_model_parallel_size
    if layers and layers % pp:
        refuse(PIPELINE, pp, f"does not divide the model's {layers} layers", f"use one of {_divisors(layers)}")
    if layers and layers % (pp * vpp):
        refuse(VIRTUAL, vpp, f"times pipeline_model_parallel_size={pp} does not divide the model's {layers} layers",
               f"use one of {_divisors(layers // pp)}")  # fmt: skip


def _check_width(option: str, size: int, model: Mapping[str, Any], entry: str) -> None:
    width = model.get(entry)
    if width and width % size:
        refuse(option, size, f"does not divide the model's {entry}={width}", f"use one of {_divisors(width)[:8]}")


def _check_experts(megatron: MegatronConfig, model: Mapping[str, Any]) -> None:
    experts = model.get("num_experts") or model.get("num_local_experts")
    ep, etp, tp = (
        megatron.expert_model_parallel_size,
        megatron.expert_tensor_parallel_size,
        megatron.tensor_model_parallel_size,
    )
    if not experts:
        for option, size in ((EXPERT, ep), (EXPERT_TENSOR, etp)):
            if size > 1:
                refuse(option, size, f"{model.get('model_type')} has no experts", "use 1")
        return
    if experts % ep:
        refuse(EXPERT, ep, f"does not divide the model's {experts} experts", f"use one of {_divisors(experts)}")
    _check_width(EXPERT_TENSOR, etp, model, "moe_intermediate_size")
    if tp > 1 and not megatron.sequence_parallel:
        refuse("actor.megatron.sequence_parallel", False, f"Megatron trains mixture-of-experts models with "
               f"tensor_model_parallel_size={tp} only under sequence parallelism", "set it to true")  # fmt: skip


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
