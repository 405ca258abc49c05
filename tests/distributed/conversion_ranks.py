"""What each rank does for test_conversion: Megatron's own dist_checkpointing on the files of the converter."""

from __future__ import annotations

import dapo_mcore.actor  # noqa: F401  adapts Megatron before its first import

# isort: split
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from dapo_mcore.actor import parallel
from dapo_mcore.actor.actor import build_actor
from dapo_mcore.actor.policy_model import PolicyModel
from dapo_mcore.checkpoint.store import CheckpointStore
from dapo_mcore.config import ActorConfig, Dtype, MegatronConfig, ModelConfig
from dapo_mcore.weights import hf_weights
from tests.distributed.weights_ranks import PP, build, differing, logits


def load(chunks: list[PolicyModel], checkpoint: Path) -> None:
    """As Megatron loads what it saved itself; every parameter was NaN before."""
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    wanted = {name: chunk.sharded_state_dict() for name, chunk in zip(names, chunks, strict=True)}
    loaded = dist_checkpointing.load(wanted, str(checkpoint))
    for name, chunk in zip(names, chunks, strict=True):
        chunk.load_state_dict(loaded[name])


def loaded(folder: Path, checkpoint: Path, sequences: list[Tensor], layout: dict[str, int]) -> dict[str, Any]:
    """What Megatron makes of `checkpoint`, which was converted from `folder`, under a layout of its own."""
    hf, chunks = build(folder, layout)
    load(chunks, checkpoint)
    exported = {name: tensor.clone() for name, tensor in hf_weights(chunks, hf)}
    result: dict[str, Any] = {"differing": differing(exported, folder)}
    if PP not in layout:
        result["logits"] = logits(chunks[0], sequences)
    return result


def trained(folder: Path, out: Path, layout: dict[str, int]) -> None:
    """A checkpoint of a training run that began with `folder`, optimizer included; no step was made."""
    parallel.destroy_model_parallel()
    megatron = MegatronConfig(**layout)
    parallel.init_model_parallel(megatron, seed=0)
    actor = build_actor(ModelConfig(path=str(folder), dtype=Dtype.fp32), ActorConfig(megatron=megatron), 1)
    CheckpointStore(out, keep=1).save(1, actor, {})
    torch.distributed.barrier()
