"""Tensors as bytes, a little at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SLICE = 16 << 20  # bytes in memory at a time, for each file that is being written


def slices(tensor: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """The elements of a tensor in order, converted to `dtype`. Views of the tensor where nothing has to be moved."""
    rows = tensor.reshape(1, 1) if not tensor.dim() else tensor
    step = max(1, SLICE // max(1, rows[0].numel() * dtype.itemsize))
    for part in rows.split(step):
        flat = part.to(dtype).contiguous().flatten()
        yield flat.view(torch.uint8).numpy().data
