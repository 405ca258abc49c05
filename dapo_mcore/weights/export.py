"""Megatron model chunks as a stream of Hugging Face tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from dapo_mcore.weights.homes import Groups, Home, homes
from dapo_mcore.weights.names import expert_names

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


@torch.no_grad()
def hf_weights(chunks: Sequence[GPTModel], hf_config: Any) -> Iterator[tuple[str, Tensor]]:
    """Every Hugging Face tensor, whole, in the parameters' dtype, on their device, on every rank, in the same order.

    Collective over the model-parallel groups: every rank must run the iterator to its end. One Megatron parameter is
    held at a time (of a mixture-of-experts layer one projection of all experts); a tensor is a view that may show
    parameters in place: read it before the next step of training, never write to it.
    The parameters must be current: with overlapped parameter gathering, call `start_param_sync(force_sync=True)` first.
    """
    groups = Groups.current()
    places = homes(chunks, hf_config, groups)
    owners = _owners(places, groups.pipeline)
    device = next(chunks[0].parameters()).device
    for home, (stage, dtype) in zip(places, owners, strict=True):
        if home.parameter.row.twin:
            continue
        whole = _gather(home, groups) if home.shards else _empty(home, dtype, device)
        if groups.pipeline.size() > 1:
            dist.broadcast(whole, dist.get_global_rank(groups.pipeline, stage), group=groups.pipeline)
        yield from _named(home, whole)


def _owners(places: list[Home], pipeline: ProcessGroup) -> list[tuple[int, torch.dtype | None]]:
    """For each parameter the pipeline stage that has it, and its dtype."""
    mine = [home.shards[0].dtype if home.shards else None for home in places]
    stages: list[Any] = [mine]
    if pipeline.size() > 1:
        stages = [None] * pipeline.size()
        dist.all_gather_object(stages, mine, group=pipeline)
    return [
        next(((stage, dtype) for stage, dtype in enumerate(held) if dtype is not None), (0, None))
        for held in zip(*stages, strict=True)
    ]


def _gather(home: Home, groups: Groups) -> Tensor:
    """The whole parameter, [full_shape], or all its experts, [experts, full_shape]."""
    layout, cutting = home.parameter.layout, groups.cutting(home.parameter)
    if not home.parameter.experts:
        (shard,) = home.shards
        return layout.join(_gather_equal(shard, cutting)) if layout.is_cut else shard
    local = torch.stack(home.shards)
    if layout.is_cut and cutting.size() > 1:
        parts = _gather_equal(local, cutting)
        local = torch.stack([layout.join([part[e] for part in parts]) for e in range(len(home.shards))])
    if groups.expert.size() == 1:
        return local
    whole = local.new_empty(home.parameter.experts, *local.shape[1:])
    dist.all_gather(list(whole.chunk(groups.expert.size())), local, group=groups.expert)
    return whole


def _gather_equal(tensor: Tensor, group: ProcessGroup) -> list[Tensor]:
    if group.size() == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


def _empty(home: Home, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """Room for a parameter that another pipeline stage sends."""
    experts = (home.parameter.experts,) if home.parameter.experts else ()
    return torch.empty(*experts, *home.parameter.layout.full_shape, dtype=dtype, device=device)


def _named(home: Home, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
    parameter = home.parameter
    form = parameter.hf_forms[0]
    if form.stacked:
        yield form.names[0], whole.mT if form.transposed else whole
        return
    for expert, full in enumerate(whole if parameter.experts else (whole,)):
        yield from zip(expert_names(form, expert), parameter.layout.to_hf(full), strict=True)
