"""A case on the ranks of its layout: one update, held against the truth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_mcore.actor import parallel
from dapo_mcore.actor.actor import Actor, build_actor
from dapo_mcore.config import MegatronConfig, ModelConfig, OptimConfig
from dapo_mcore.weights import hf_weights
from tools.certificate.cases import TOLERANCE, Case, model_folder, truth_file
from tools.certificate.reference import Truth

NOT_OF_THE_LOSS = {"actor/lr", "actor/imbalance"}
FROZEN = OptimConfig(lr=0.0, clip_grad=1e9)  # an update that changes nothing and clips nothing


@dataclass(frozen=True)
class Worst:
    name: str
    error: float


@dataclass(frozen=True)
class Measured:
    """Relative errors of a case."""

    case: Case
    loss: float
    gradient: Worst
    metric: Worst

    @property
    def is_within(self) -> bool:
        errors = (self.loss, self.gradient.error, self.metric.error)
        return all(error <= TOLERANCE[self.case.dtype] for error in errors)  # NaN is not


def measure_all(cases: Iterable[Case], folder: Path) -> list[Measured]:
    """Collective. Groups are made once for all successive cases of a layout: they take longer than a case."""
    measured: list[Measured] = []
    for layout, group in groupby(cases, key=lambda case: case.layout):
        with laid_out(layout.megatron):
            measured += [measure(case, folder) for case in group]
    return measured


@contextmanager
def laid_out(megatron: MegatronConfig) -> Iterator[None]:
    """Megatron's groups."""
    parallel.init_model_parallel(megatron, seed=0)
    try:
        yield
    finally:
        parallel.destroy_model_parallel()


def measure(case: Case, folder: Path) -> Measured:
    """Under the case's groups; what counts is said on rank 0."""
    options = case.actor_config(megatron=case.layout.megatron, optim=FROZEN)
    model = ModelConfig(path=str(model_folder(folder, case)), dtype=case.dtype)
    actor = build_actor(model, options, total_steps=1)
    metrics = {name: ratio.value for name, ratio in actor.update(case.batch()).items()}
    return compare(case, metrics, gradients(actor), torch.load(truth_file(folder, case), weights_only=False))


def gradients(actor: Actor) -> dict[str, Tensor]:
    """Of the last update, float64 on the host, whole, by Hugging Face name; 0 where nothing is trained. Collective; the
    actor is as before."""
    _gather_reduced_shards(actor)
    parameters = [parameter for chunk in actor.chunks for parameter in chunk.parameters()]
    weights = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = getattr(parameter, "main_grad", torch.zeros_like(parameter, dtype=torch.float32))
        return {name: gradient.cpu().double().clone() for name, gradient in hf_weights(actor.chunks, actor.hf_config)}
    finally:
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data = weight


def _gather_reduced_shards(actor: Actor) -> None:
    """The distributed optimizer leaves each rank with its shard of the summed gradients."""
    for ddp in actor._ddp_chunks:
        if not ddp.ddp_config.use_distributed_optimizer:
            continue
        for buffer in ddp.buffers + ddp.expert_parallel_buffers:
            for bucket in buffer.buckets:
                group: Any = buffer.data_parallel_group
                shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def compare(case: Case, metrics: Mapping[str, float], found: Mapping[str, Tensor], truth: Truth) -> Measured:
    """Loss and metrics relative to their size, or to 1 where they are smaller; see `relative_error` for gradients."""
    unknown = (metrics.keys() - NOT_OF_THE_LOSS) ^ truth.metrics.keys() | found.keys() ^ truth.gradients.keys()
    if unknown:
        return Measured(case, math.nan, Worst(f"only on one side: {sorted(unknown)}", math.nan), Worst("", math.nan))
    return Measured(
        case,
        _scaled(metrics["actor/loss"], truth.loss),
        worst({name: relative_error(found[name], wanted) for name, wanted in truth.gradients.items()}),
        worst({name: _scaled(metrics[name], wanted) for name, wanted in truth.metrics.items()}),
    )


def _scaled(found: float, wanted: float) -> float:
    return abs(found - wanted) / max(1.0, abs(wanted))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||; an expert without a token wants zeros."""
    return ((found - wanted).norm() / (wanted.norm() or 1.0)).item()


def worst(errors: Mapping[str, float]) -> Worst:
    """NaN is worse than anything."""
    name = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return Worst(name, errors[name])
