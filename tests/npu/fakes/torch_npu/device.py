"""torch.npu: devices, memory and random numbers of the CPU."""

from __future__ import annotations

import os
import resource

import torch


def is_available() -> bool:
    return True


def device_count() -> int:
    return int(os.environ.get("FAKE_NPU_COUNT", "8"))


def set_device(index: int) -> None:
    if not 0 <= index < device_count():
        raise RuntimeError(f"SetDevice: invalid device id {index}")
    CURRENT[0] = index


def current_device() -> int:
    return CURRENT[0]


def synchronize(device: object = None) -> None:
    pass


def empty_cache() -> None:
    pass


def memory_allocated(device: object = None) -> int:
    return max_memory_allocated() // 2


def max_memory_allocated(device: object = None) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory_stats(device: object = None) -> None:
    """The system knows one peak, since the process started."""


def get_device_name(device: object = None) -> str:
    return "Ascend of the fakes"


def mem_get_info(device: object = None) -> tuple[int, int]:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total - memory_allocated(), total


def manual_seed_all(seed: int) -> None:
    """torch.manual_seed has seeded the CPU."""


manual_seed = manual_seed_all


def get_rng_state(device: object = None) -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device: object = None) -> None:
    torch.set_rng_state(state)


def _is_in_bad_fork() -> bool:
    return False


CURRENT = [0]
