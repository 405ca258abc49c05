"""What the rest of the project may ask about the accelerator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dapo_mcore.config import MegatronConfig
from dapo_mcore.platform.engines import EngineTraits


class UnusableDeviceError(RuntimeError):
    """This machine's accelerator, or what drives it, is not what a run needs; the message has the way out."""


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """Memory of this process on its device, bytes."""

    used: int
    peak: int  # since the process started
    total: int  # of the device, all processes


@dataclass(frozen=True, slots=True)
class Platform:
    """Facts and services of one kind of device, for this process."""

    name: str
    device: torch.device  # of this rank
    collective_backend: str  # for torch.distributed.init_process_group; serves tensors on the device and on the CPU
    has_transformer_engine: bool  # whether Megatron's Transformer Engine layers can be built
    tower_attention: str  # transformers' name of the attention of a vision tower: full, image by image
    pins_host_memory: bool  # copies to and from the device need page-locked memory to be fast
    actor_resources: Callable[[int], dict[str, Any]]  # so many devices -> what a Ray actor's options call them
    memory_stats: Callable[[], MemoryStats]
    synchronize: Callable[[], None]  # wait until the device has done what it was given
    empty_cache: Callable[[], None]  # give cached, unused memory back to the device
    adapt_megatron: Callable[[], None]  # before megatron.core is imported; idempotent
    configure_megatron: Callable[[MegatronConfig], None]  # before process groups are cut and layers are described
    make_deterministic: Callable[[], None]  # repeatable kernels and collectives; before process groups are made
    engines: EngineTraits  # of rollout engines on it
