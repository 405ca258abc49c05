"""Handles of tensors for other processes: importing torch_npu replaces torch's way of making them."""

from __future__ import annotations

from typing import Any

import torch
from npu_contract import require
from torch.multiprocessing import reductions

ND = 2  # the plain format; NZ, 29, is that of matrix units


def rebuild_npu_tensor(*arguments: Any) -> torch.Tensor:
    raise NotImplementedError("there is no device memory to share")


def reduce_tensor(tensor: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
    """(rebuild_npu_tensor, 15 arguments); the seventh is the index of the device."""
    require(getattr(tensor, "npu_format", ND) == ND, "a tensor for another process is in ND format")
    require(tensor.is_leaf or not tensor.requires_grad, "a tensor for another process is detached")
    arguments: list[Any] = [None] * 15
    arguments[:4] = [type(tensor), tensor.size(), tensor.stride(), tensor.storage_offset()]
    arguments[6] = torch.npu.current_device()
    return rebuild_npu_tensor, tuple(arguments)


def rebind() -> None:
    reductions.reduce_tensor = reduce_tensor
