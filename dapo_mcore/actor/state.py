"""Model and optimizer as what megatron.core.dist_checkpointing saves and loads, whatever the layout on either side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from dapo_mcore.actor.policy_model import PolicyModel

# The only format that loads under another layout and was seen to be right; without the second entry the names of
# optimizer states depend on whether experts are spread over ranks.
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def sharded_state(chunks: Sequence[PolicyModel], optimizer: ChainedOptimizer, loading: bool) -> dict[str, Any]:
    """Sharded tensors of weights, fp32 main weights and Adam's moments; `loading`: to be filled, not saved."""
    metadata = dict(_SHARDING)  # Megatron writes this layout's process groups into it
    models = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in _named(chunks)}
    model = models["model"] if len(chunks) == 1 else models
    with _without_bucket_padding(optimizer):
        return {**models, "optimizer": optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)}


@contextmanager
def _without_bucket_padding(optimizer: ChainedOptimizer) -> Iterator[None]:
    """Megatron 0.16 joins the buckets' states without the padding between them, but slices by places that count it.

    With several buckets, which overlapped reduction makes, all states but those of the first would be saved shifted.
    """
    parts = [part for part in optimizer.chained_optimizers if isinstance(part, DistributedOptimizer)]
    buffers = [buffer for part in parts for buffer in part.buffers]
    padded = [buffer.param_index_map for buffer in buffers]
    try:
        for buffer in buffers:
            buffer.param_index_map = _unpadded_places(buffer)
        yield
    finally:
        for buffer, places in zip(buffers, padded, strict=True):
            buffer.param_index_map = places


def _unpadded_places(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    """Parameter -> (first element, element after the last, bucket)."""
    padding = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
    before = [0, *accumulate(padding)]
    places = buffer.param_index_map.items()
    return {p: (start - before[bucket], stop - before[bucket], bucket) for p, (start, stop, bucket) in places}


def load_sharded_state(
    chunks: Sequence[PolicyModel], optimizer: ChainedOptimizer, loaded: dict[str, Any], updates: int
) -> None:
    """Take over what `dist_checkpointing.load` made of a `sharded_state` whose optimizer had made `updates` updates.

    Learning rate, betas and weight decay stay those of this run's options.
    """
    for name, chunk in _named(chunks):
        chunk.load_state_dict(loaded[name])
    parts = optimizer.chained_optimizers
    states = [loaded["optimizer"]] if len(parts) == 1 else [loaded["optimizer"][index] for index in range(len(parts))]
    for part, state in zip(parts, states, strict=True):
        if isinstance(part, DistributedOptimizer):
            # Not by load_state_dict alone: MindSpeed's knows no states in this format.
            part.load_state_dict({"optimizer": _own_parameter_groups(part, updates)})
            part.load_parameter_state_from_fully_reshardable(state["param_state"])
        else:
            part.load_state_dict(state)


def _own_parameter_groups(optimizer: DistributedOptimizer, updates: int) -> dict[str, Any]:
    """The saved groups may be those of another layout, where experts had an optimizer of their own, or had none."""
    own = optimizer.state_dict()["optimizer"]
    for group in own["param_groups"]:
        group["step"] = updates
    return own


def _named(chunks: Sequence[PolicyModel]) -> list[tuple[str, PolicyModel]]:
    """Under the names Megatron's optimizer looks for."""
    return [("model", chunks[0])] if len(chunks) == 1 else [(f"model{i}", chunk) for i, chunk in enumerate(chunks)]
