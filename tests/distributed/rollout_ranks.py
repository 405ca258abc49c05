"""What each rank of the colocated-rollout tests does. Only rank 0's answers count, as in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dapo_mcore.rollout.colocated import ColocatedEngine
from dapo_mcore.rollout.engine import Request, Sampling, generate
from dapo_mcore.rollout.leader import lead
from dapo_mcore.rollout.ranks import RolloutError
from dapo_mcore.types import Response
from tests.e2e.tiny_policies import LENGTHS, Letters, model_config, rollout_config, weights_in

Answers = dict[str, Any]


def sample(engine: ColocatedEngine, requests: list[Request], sampling: Sampling) -> list[Response]:
    """One led phase: on every rank the leader's responses."""
    return lead(lambda: generate(engine, requests, sampling), engine)


def error_of(action: Any) -> str:
    try:
        action()
    except RolloutError as error:
        return str(error)
    return ""


def replicas_and_failures(
    first: Path, second: Path, requests: list[Request], too_long: Request, sampling: Sampling
) -> Answers:
    """Two replicas of one rank each; then one rank fails alone, while it updates and while it samples."""
    engine = ColocatedEngine(model_config(first), rollout_config(), Letters(), **LENGTHS)
    answers: Answers = {"fresh": sample(engine, requests, sampling)}
    engine.load(weights_in(second), 1)
    answers["updated"] = sample(engine, requests, sampling)
    answers["few"] = sample(engine, requests[:1], sampling)
    answers["sum over ranks"] = float(_all_reduced(dist.get_rank() + 1))
    answers["sampling failed"] = error_of(lambda: sample(engine, [requests[0], too_long], sampling))
    answers["after failure"] = sample(engine, requests, sampling)
    left_out = {1: "model.norm.weight"}.get(dist.get_rank())
    weights = [pair for pair in weights_in(first) if pair[0] != left_out]
    answers["update failed"] = error_of(lambda: engine.load(weights, 2))
    return answers


def one_replica_over_all(
    first: Path, second: Path, requests: list[Request], sampling: Sampling, options: dict[str, Any]
) -> Answers:
    """All ranks together are one replica."""
    rollout = rollout_config(tensor_model_parallel_size=dist.get_world_size(), **options)
    engine = ColocatedEngine(model_config(first), rollout, Letters(), **LENGTHS)
    answers: Answers = {"fresh": sample(engine, requests, sampling)}
    for version in (1, 2, 3):
        engine.load(weights_in(second if version % 2 else first), version)
        answers[f"update {version}"] = sample(engine, requests, sampling)
    answers["sum over ranks"] = float(_all_reduced(dist.get_rank() + 1))
    answers["shared memory"] = _shared_memory_name()
    return answers


def _shared_memory_name() -> str:
    from vllm.distributed.parallel_state import get_tp_group

    return get_tp_group().device_communicator.dist_module.group_name


def _all_reduced(value: int) -> torch.Tensor:
    tensor = torch.tensor(float(value))
    dist.all_reduce(tensor)
    return tensor
