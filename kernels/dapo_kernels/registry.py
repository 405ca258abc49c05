"""Which backend computes: one name per row, and what `auto` means on a device."""

from __future__ import annotations

import torch

from dapo_kernels import torch_rows
from dapo_kernels.chunks import RowKernels

REFERENCE = "reference"


def _torch_kernels() -> RowKernels:
    return RowKernels(torch_rows.statistics, torch_rows.gradient)


CHUNKED = {"torch": _torch_kernels}
BACKENDS = ("auto", REFERENCE, *CHUNKED)


def resolve(backend: str, device: torch.device) -> str:
    """`auto` becomes the name of the backend for `device`; an unknown name raises ValueError."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r}, expected one of {', '.join(BACKENDS)}")
    return "torch" if backend == "auto" else backend


def row_kernels(name: str) -> RowKernels:
    return CHUNKED[name]()
