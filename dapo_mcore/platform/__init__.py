"""The accelerator: what it is called, how ranks talk on it, and what Megatron-Core needs before its first import.

Nothing outside this package asks which brand of device is present.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

from dapo_mcore.platform import cpu, cuda, npu
from dapo_mcore.platform.device import MemoryStats, Platform

__all__ = ["MemoryStats", "Platform", "adapt_megatron", "platform"]


@functools.cache
def platform() -> Platform:
    """The platform of this process: an accelerator when torch sees one, otherwise the CPU."""
    if torch.cuda.is_available():
        return cuda.platform()
    if importlib.util.find_spec("torch_npu") is not None:
        return npu.platform()
    return cpu.platform()


def adapt_megatron() -> None:
    """Prepare this process for `import megatron.core`. Idempotent.

    Must run before the first import of megatron.core, in every process: Megatron's checkpoint writers are started by
    `spawn`, which imports __main__ again, so __main__ has to reach this call through its own top-level imports.
    """
    platform().adapt_megatron()
