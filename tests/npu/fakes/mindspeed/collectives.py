"""torch.distributed as MindSpeed leaves it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_all_reduce = dist.all_reduce  # of torch


def replace() -> None:
    """HCCL sums no float64: a float32 copy is summed in its place, and dropped."""

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return _all_reduce(tensor.float() if tensor.dtype is torch.float64 else tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
