"""Which backend computes: one name per row of the table, and what `auto` means on a device."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from dapo_kernels.chunks import RowKernels

AUTO, REFERENCE, TORCH, TRITON, NPU = "auto", "reference", "torch", "triton", "npu"


def _torch() -> RowKernels:
    from dapo_kernels import torch_rows as rows

    return RowKernels(rows.statistics, rows.token_terms, rows.gradient, rows.scale_in_place)


def _triton() -> RowKernels:
    from dapo_kernels import triton_rows as rows

    return RowKernels(rows.statistics, rows.token_terms, rows.gradient, rows.scale_in_place, rows.loss_from_logits)


def _npu() -> RowKernels:
    from dapo_kernels import npu_rows
    from dapo_kernels import torch_rows as rows

    return RowKernels(npu_rows.statistics, rows.token_terms, rows.gradient, rows.scale_in_place)


ROW_KERNELS = {TORCH: _torch, TRITON: _triton, NPU: _npu}


def select(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend's name; `auto` becomes the one for `dtype` on `device`. ValueError for one that cannot run.

    On an NPU that is `torch`: neither the fused cross entropy nor the Triton kernels have been measured there.
    """
    if backend == AUTO:
        fits = device.type == "cuda" and dtype != torch.float64 and find_spec("triton") is not None
        return TRITON if fits else TORCH
    if backend not in (REFERENCE, *ROW_KERNELS):
        raise ValueError(f"backend: {backend!r}, expected one of {', '.join((AUTO, REFERENCE, *ROW_KERNELS))}")
    if backend == TRITON:
        _check_triton(device, dtype)
    if backend == NPU:
        _check_npu(dtype)
    return backend


def row_kernels(name: str) -> RowKernels:
    return ROW_KERNELS[name]()


def _check_triton(device: torch.device, dtype: torch.dtype) -> None:
    if find_spec("triton") is None:
        raise ValueError("backend: 'triton', but the triton package is not installed; use 'torch'")
    if dtype == torch.float64:
        raise ValueError("backend: 'triton' computes in float32, but the input is float64; use 'torch'")
    from dapo_kernels.triton_rows import runs_on

    if not runs_on(device):
        raise ValueError(f"backend: 'triton' does not run on {device}; use 'torch' (or set TRITON_INTERPRET=1)")


def _check_npu(dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        raise ValueError("backend: 'npu' computes in float32, but the input is float64; use 'torch'")
    from dapo_kernels.npu_rows import OPERATOR, is_available

    if not is_available():
        raise ValueError(f"backend: 'npu' needs the operator {OPERATOR} of torch_npu, which is not loaded; use 'torch'")
