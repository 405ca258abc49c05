"""The accelerator: what it is called, how ranks talk on it, and what Megatron-Core needs before its first import.

Nothing outside this package asks which brand of device is present.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from dapo_mcore.platform import cpu, cuda, npu
from dapo_mcore.platform.device import MemoryStats, Platform, UnusableDeviceError

__all__ = ["MemoryStats", "Platform", "UnusableDeviceError", "adapt_megatron", "platform"]

OVERRIDE = "DAPO_PLATFORM"
PLATFORMS = {"cpu": cpu.platform, "cuda": cuda.platform, "npu": npu.platform}


@functools.cache
def platform() -> Platform:
    """The platform of this process: an accelerator when there is one, otherwise the CPU.

    Raises:
        UnusableDeviceError: what drives the accelerator is missing or does not fit.
    """
    return PLATFORMS[_name()]()


def _name() -> str:
    """As DAPO_PLATFORM says, or as found. torch_npu makes torch.cuda answer for the NPU, so that is asked last."""
    chosen = os.environ.get(OVERRIDE)
    if chosen is not None and chosen not in PLATFORMS:
        raise UnusableDeviceError(f"{OVERRIDE}={chosen}: no such platform; use one of {', '.join(PLATFORMS)}, or unset")
    if chosen is not None:
        return chosen
    if importlib.util.find_spec("torch_npu") is not None:
        return "npu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def adapt_megatron() -> None:
    """Prepare this process for `import megatron.core`. Idempotent.

    Must run before the first import of megatron.core, in every process: Megatron's checkpoint writers are started by
    `spawn`, which imports __main__ again, so __main__ has to reach this call through its own top-level imports.
    """
    platform().adapt_megatron()
