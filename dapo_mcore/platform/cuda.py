"""CUDA devices, with NCCL. Megatron-Core needs no adapting here."""

from __future__ import annotations

import importlib.util
import os

import torch

from dapo_mcore.config import MegatronConfig
from dapo_mcore.platform.device import MemoryStats, Platform
from dapo_mcore.platform.engines import EngineTraits


def _memory_stats() -> MemoryStats:
    return MemoryStats(
        used=torch.cuda.memory_allocated(),
        peak=torch.cuda.max_memory_allocated(),
        total=torch.cuda.mem_get_info()[1],
    )


def _nothing() -> None:
    """Megatron-Core is written for this device."""


def _nothing_to_configure(_: MegatronConfig) -> None:
    """Its options are in the TransformerConfig."""


def _make_deterministic() -> None:
    """cuBLAS and Transformer Engine read the environment when they are first used."""
    os.environ.update(CUBLAS_WORKSPACE_CONFIG=":4096:8", NVTE_ALLOW_NONDETERMINISTIC_ALGO="0")
    torch.use_deterministic_algorithms(True)


def platform() -> Platform:
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return Platform(
        name="cuda",
        device=device,
        collective_backend="cpu:gloo,cuda:nccl",  # small decisions travel as CPU tensors
        has_transformer_engine=importlib.util.find_spec("transformer_engine") is not None,
        tower_attention="sdpa",
        pins_host_memory=True,
        actor_resources=lambda count: {"num_gpus": count},
        memory_stats=_memory_stats,
        synchronize=torch.cuda.synchronize,
        empty_cache=torch.cuda.empty_cache,
        adapt_megatron=_nothing,
        configure_megatron=_nothing_to_configure,
        make_deterministic=_make_deterministic,
        engines=EngineTraits(sleep_level=2),  # every parameter is written before the next sampling
    )
