"""Process groups: one torch.distributed world, cut by Megatron into its parallel groups."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from dapo_mcore.config import MegatronConfig
from dapo_mcore.platform import platform


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the ranks of a run meet."""

    init_method: str  # e.g. file:///shared/rendezvous
    rank: int
    world_size: int


def init_process_group(rendezvous: Rendezvous | None = None, timeout_s: float = 1800.0) -> None:
    """Join the other ranks; does nothing when this process already has.

    Without `rendezvous` the launcher's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) decides, and a process
    that was started without a launcher is a world of its own.
    """
    if dist.is_initialized():
        return
    backend, timeout = platform().collective_backend, timedelta(seconds=timeout_s)
    if rendezvous is not None:
        dist.init_process_group(
            backend,
            init_method=rendezvous.init_method,
            rank=rendezvous.rank,
            world_size=rendezvous.world_size,
            timeout=timeout,
        )
    elif "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def init_model_parallel(config: MegatronConfig, seed: int) -> None:
    """Cut the world into Megatron's groups and seed its random streams. Collective."""
    platform().configure_megatron(config)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_stages(config),
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def virtual_stages(config: MegatronConfig) -> int | None:
    """As Megatron names it: None without interleaving."""
    size = config.virtual_pipeline_model_parallel_size
    return size if size > 1 else None


def destroy_model_parallel() -> None:
    """End Megatron's groups, so that another layout can be initialised in the same processes. Every rank.

    Megatron itself only forgets them. A gloo group keeps threads that wake up a hundred times a second: those of some
    dozen forgotten layouts take the processor from everybody else.
    """
    groups = [group for group in parallel_state._global_process_group_list or () if group is not None]
    parallel_state.destroy_model_parallel()
    for group in groups:
        with contextlib.suppress(ValueError):  # Megatron has ended a few of them itself
            dist.destroy_process_group(group)
