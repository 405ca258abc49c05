"""What the ranks of the actor's distributed tests run; importable by the processes that are spawned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_mcore.actor import optimizer, parallel
from dapo_mcore.actor.actor import Actor, build_actor
from dapo_mcore.config import (
    ActorConfig,
    Dtype,
    MegatronConfig,
    ModelConfig,
    OptimConfig,
    TowerTraining,
    VisionConfig,
)
from dapo_mcore.types import TrainBatch
from tools.certificate.layouts import SEEING, megatron_config
from tools.certificate.measure import gradients, relative_error
from tools.certificate.vision import with_images


@dataclass(frozen=True)
class Case:
    """One model under one layout, and what the update is made on."""

    family: str
    layout: dict[str, Any] = field(default_factory=dict)
    batch: str = "mixed"
    dtype: Dtype = Dtype.fp32


@dataclass(frozen=True)
class Truth:
    """Of the reference: log-probabilities [N], loss, gradients by Hugging Face name."""

    logprobs: Tensor
    loss: float
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Errors:
    logprobs: float  # largest, absolute
    loss: float  # absolute
    gradients: dict[str, float]  # of each tensor, relative to its norm
    grad_norm: float  # relative
    metrics: dict[str, float]


# tokens of a micro-batch; below the longest response of "mixed", whose ranks then need 2 and 3 micro-batches
BUDGET = 40


@contextmanager
def actor(
    folder: Path, megatron: MegatronConfig, dtype: Dtype = Dtype.fp32, seed: int = 0, **options: Any
) -> Iterator[Actor]:
    """An actor over the model in `folder`; by default one whose updates change nothing and clip nothing."""
    options = {"optim": OptimConfig(lr=0.0, clip_grad=1e9), "ppo_max_token_len_per_gpu": BUDGET, **options}
    parallel.init_model_parallel(megatron, seed)
    try:
        model = ModelConfig(path=str(folder), dtype=dtype)
        yield build_actor(model, ActorConfig(megatron=megatron, **options), total_steps=10)
    finally:
        parallel.destroy_model_parallel()


def weights(actor: Actor) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in actor.weights()}


def compare(case: Case, folder: Path, batch: TrainBatch, truth: Truth) -> Errors:
    with actor(folder / case.family, megatron_config(**case.layout), case.dtype) as policy:
        logprobs = policy.logprobs(batch)
        metrics = policy.update(batch)
        found = gradients(policy)
    norm = torch.stack([gradient.norm() for gradient in truth.gradients.values()]).norm().item()
    assert found.keys() == truth.gradients.keys()
    return Errors(
        logprobs=(logprobs - truth.logprobs).abs().max().item(),
        loss=abs(metrics["actor/loss"].value - truth.loss),
        gradients={name: relative_error(found[name], wanted) for name, wanted in truth.gradients.items()},
        grad_norm=abs(metrics["actor/grad_norm"].value / norm - 1),
        metrics={name: ratio.value for name, ratio in metrics.items()},
    )


def compare_all(cases: dict[str, Case], folder: Path) -> dict[str, Errors]:
    """The truths lie beside the models, as <family>.<batch>.pt."""
    errors = {}
    for name, case in cases.items():
        batch, truth = torch.load(folder / f"{case.family}.{case.batch}.pt", weights_only=False)
        errors[name] = compare(case, folder, batch, truth)
    return errors


TRAINING = {
    "optim": OptimConfig(lr=1e-2, lr_warmup_steps=2, clip_grad=1.0),
    "vision": VisionConfig(train=TowerTraining.all),  # means nothing to a model of text
}


@dataclass(frozen=True)
class Resume:
    """A run saved under one layout and continued under another."""

    family: str
    saver: MegatronConfig
    loader: MegatronConfig
    dtype: Dtype = Dtype.fp32


def resume_all(cases: dict[str, Resume], folder: Path, batches: list[TrainBatch]) -> dict[str, tuple[Any, Any]]:
    """name -> metrics of the updates after the first step: uninterrupted, and by another actor that loads before."""
    results = {}
    for name, case in cases.items():
        results[name] = _resume(case, folder, folder / f"checkpoint_{len(results)}", batches)
    return results


def _resume(case: Resume, folder: Path, checkpoint: Path, batches: list[TrainBatch]) -> tuple[Any, Any]:
    from megatron.core import dist_checkpointing

    if case.family in SEEING:
        batches = [with_images(batch) for batch in batches]
    if dist.get_rank() == 0:
        checkpoint.mkdir()
    dist.barrier()
    with actor(folder / case.family, case.saver, case.dtype, **TRAINING) as first:
        first.update(batches[0])
        first.finish_step()
        take_a_turn(first)
        dist_checkpointing.save(first.state(), str(checkpoint))
        uninterrupted = [first.update(batch) for batch in batches[1:]]
    with actor(folder / case.family, case.loader, case.dtype, **TRAINING) as second:
        second.load_state(dist_checkpointing.load(second.state(loading=True), str(checkpoint)))
        assert second.step == 1
        take_a_turn(second)
        resumed = [second.update(batch) for batch in batches[1:]]
    return uninterrupted, resumed


Trainings = dict[str, tuple[str, MegatronConfig]]


def train_all(cases: Trainings, folder: Path, batches: list[TrainBatch]) -> dict[str, Any]:
    """name -> (metrics of each update, weights by Hugging Face name after the last)."""
    results = {}
    for name, (family, megatron) in cases.items():
        with actor(folder / family, megatron, **TRAINING) as policy:
            metrics = []
            for batch in batches:
                metrics.append(policy.update(batch))
                policy.finish_step()
            results[name] = metrics, weights(policy)
    return results


def train_in_turns(cases: Trainings, folder: Path, batches: list[TrainBatch]) -> dict[str, Any]:
    """As `train_all`, and the bytes left on the device while the policy is offloaded before each update."""
    results = {}
    for name, (family, megatron) in cases.items():
        with actor(folder / family, megatron, **TRAINING) as policy:
            metrics, left = [], []
            for batch in batches:
                left.append(left_on_device(policy))
                metrics.append(policy.update(batch))
                policy.finish_step()
            left.append(left_on_device(policy))
            results[name] = metrics, weights(policy), left
    return results


def take_a_turn(policy: Actor) -> None:
    """Away and back, as its options say."""
    with policy.on_host():
        pass


def left_on_device(policy: Actor) -> int:
    """Bytes of parameters, gradients, main parameters and moments while the policy is on the host."""
    with policy.on_host():
        parameters = [p for chunk in policy.chunks for p in chunk.parameters()]
        groups, states = policy._optimizer.param_groups, policy._optimizer.state.items()
        tensors = [*parameters, *(p.main_grad for p in parameters), *(p for group in groups for p in group["params"])]
        tensors += [value for _, state in states for value in state.values() if torch.is_tensor(value)]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def run_training(
    trainings: Trainings, resumes: dict[str, Resume], turns: Trainings, folder: Path, batches: list[TrainBatch]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Where communication overlaps, in many small buckets: a parameter read too early is an old one."""
    small = partial(optimizer.DistributedDataParallelConfig, bucket_size=4096)
    with mock.patch.object(optimizer, "DistributedDataParallelConfig", small):
        return (
            train_all(trainings, folder, batches),
            resume_all(resumes, folder, batches),
            train_in_turns(turns, folder, batches),
        )
