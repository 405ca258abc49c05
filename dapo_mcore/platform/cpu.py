"""The host processor, with gloo: the same code path as on an accelerator, for tests and small runs."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch

from dapo_mcore.config import MegatronConfig
from dapo_mcore.platform import megatron_cpu
from dapo_mcore.platform.device import MemoryStats, Platform
from dapo_mcore.platform.engines import EngineTraits


def _memory_stats() -> MemoryStats:
    page = os.sysconf("SC_PAGE_SIZE")
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return MemoryStats(
        used=resident_pages * page,
        peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux reports KiB
        total=os.sysconf("SC_PHYS_PAGES") * page,
    )


def _nothing() -> None:
    """Work on a CPU is synchronous and its allocator keeps no device cache; it repeats its results."""


def _nothing_to_configure(_: MegatronConfig) -> None:
    """The adapter has no switches."""


def platform() -> Platform:
    return Platform(
        name="cpu",
        device=torch.device("cpu"),
        collective_backend="gloo",
        has_transformer_engine=False,
        tower_attention="sdpa",
        pins_host_memory=False,
        actor_resources=lambda _: {},
        memory_stats=_memory_stats,
        synchronize=_nothing,
        empty_cache=_nothing,
        adapt_megatron=megatron_cpu.apply,
        configure_megatron=_nothing_to_configure,
        make_deterministic=_nothing,
        engines=EngineTraits(sleep_level=0),
    )
