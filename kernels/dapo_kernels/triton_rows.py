"""Launches the Triton kernels; the same contracts as torch_rows, for float32 chunks. Imports triton."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from dapo_kernels import triton_kernels
from dapo_kernels.policy import TokenInputs
from dapo_kernels.shard import RowStatistics
from dapo_kernels.spec import KLEstimator, PolicyLossSpec, Surrogate

kernels: Any = triton_kernels  # launched with keywords of Triton's own
MAX_PROGRAMS = 65_535  # of a grid on Ascend
UNIFIED_BUFFER_BYTES = 192 * 1024  # of an Ascend vector core; half of it, as loads are double-buffered
TOKEN_BLOCK = 128
NUM_WARPS = 8
KL_CODES = {
    KLEstimator.K1: kernels.KL_K1,
    KLEstimator.K2: kernels.KL_K2,
    KLEstimator.K3: kernels.KL_K3,
    KLEstimator.LOW_VAR: kernels.KL_LOW_VAR,
}


def block_columns(columns: int) -> int:
    """Columns per block: a power of two whose live values fit into half of the unified buffer."""
    largest = UNIFIED_BUFFER_BYTES // 2 // (4 * kernels.LIVE_VALUES)
    return min(1 << (largest.bit_length() - 1), max(16, 1 << (columns - 1).bit_length()))


def programs(work_items: int) -> tuple[int]:
    return (max(1, min(work_items, MAX_PROGRAMS)),)


def runs_on(device: torch.device) -> bool:
    """CUDA, or anything under Triton's interpreter."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def statistics(logits: Tensor, columns: Tensor, inverse_temperature: float) -> RowStatistics:
    """As torch_rows.statistics; leaves the logits alone."""
    rows, width = logits.shape
    values = logits.new_empty(5, rows)
    with torch.cuda.device_of(logits):
        kernels.row_statistics[programs(rows)](
            logits, logits.stride(0), columns, values, rows, width, inverse_temperature,
            BLOCK=block_columns(width), num_warps=NUM_WARPS)  # fmt: skip
    return RowStatistics(*values.unbind())


def token_terms(merged: RowStatistics, tokens: TokenInputs, spec: PolicyLossSpec) -> tuple[Tensor, Tensor, Tensor]:
    """As torch_rows.token_terms, in one launch."""
    fields = (merged.peak, merged.sum_exp, merged.weighted, merged.target, merged.held)
    packed, rows = torch.stack(fields), len(merged.peak)
    out = packed.new_empty(3, rows)
    with torch.cuda.device_of(packed):
        kernels.token_terms[programs(-(-rows // TOKEN_BLOCK))](
            packed, *_token_pointers(tokens), out, rows, *_bounds(spec), spec.kl_coeff,
            **_token_flags(tokens, spec), BLOCK=TOKEN_BLOCK, num_warps=4)  # fmt: skip
    logprobs, entropy, derivative = out.unbind()
    return logprobs, entropy, derivative


def gradient(
    logits: Tensor,
    columns: Tensor,
    local: RowStatistics,
    merged: RowStatistics,
    derivative: Tensor,
    bonus: Tensor | None,
    inverse_temperature: float,
    sources: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """As torch_rows.gradient, but in `dtype` at once: in the memory of the logits, each row at its own beginning."""
    count, width = len(sources), logits.shape[1]
    out = logits.view(dtype)[:count, :width]
    with torch.cuda.device_of(logits):
        kernels.row_gradient[programs(count)](
            logits, logits.stride(0), out, out.stride(0), sources, columns, merged.peak, merged.sum_exp,
            merged.entropy, derivative, derivative if bonus is None else bonus, count, width, inverse_temperature,
            BLOCK=block_columns(width), HAS_BONUS=bonus is not None, NARROWS=dtype.itemsize < logits.dtype.itemsize,
            num_warps=NUM_WARPS)  # fmt: skip
    return out


def loss_from_logits(
    logits: Tensor,
    width: int,
    columns: Tensor,
    loss_mask: Tensor,
    tokens: TokenInputs,
    spec: PolicyLossSpec,
    scale: Tensor,
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """logprobs [T], entropy [T] of logits [T, V] whose first `width` columns count; writes gradient [T, V] if given.

    `gradient` includes `scale` (0-d) and may be the logits themselves.
    """
    rows = logits.shape[0]
    logprobs, entropy = torch.zeros(2, rows, dtype=torch.float32, device=logits.device).unbind()
    out = logits if gradient is None else gradient
    with torch.cuda.device_of(logits):
        kernels.loss_from_logits[programs(rows)](
            logits, logits.stride(0), out, out.stride(0), loss_mask.to(torch.int8), columns,
            *_token_pointers(tokens), scale, logprobs, entropy, rows, width, logits.shape[1], *_bounds(spec),
            spec.kl_coeff, spec.entropy_coeff, 1 / spec.temperature, **_token_flags(tokens, spec),
            HAS_BONUS=spec.entropy_coeff != 0, WRITES=gradient is not None, BLOCK=block_columns(logits.shape[1]),
            num_warps=NUM_WARPS)  # fmt: skip
    return logprobs, entropy


def scale_in_place(values: Tensor, factor: Tensor) -> None:
    """values *= factor (0-d), at no cost where the factor is 1: the device looks, the host does not wait."""
    block = block_columns(values.numel())
    with torch.cuda.device_of(values):
        kernels.scale_in_place[programs(min(-(-values.numel() // block), 4096))](
            values, factor, values.numel(), BLOCK=block, num_warps=NUM_WARPS)  # fmt: skip


def _token_pointers(tokens: TokenInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Advantages, old, ref, weights; an absent one is never read and stands as the advantages."""
    present = tokens.advantages.contiguous()
    optional = (tokens.old_logprobs, tokens.ref_logprobs, tokens.token_weights)
    old, ref, weights = (present if x is None else x.contiguous() for x in optional)
    return present, old, ref, weights


def _token_flags(tokens: TokenInputs, spec: PolicyLossSpec) -> dict[str, Any]:
    penalised = tokens.ref_logprobs is not None and spec.kl_coeff != 0
    return {
        "HAS_OLD": tokens.old_logprobs is not None,
        "HAS_WEIGHTS": tokens.token_weights is not None,
        "KL": KL_CODES[spec.kl_estimator].value if penalised else kernels.NO_KL.value,
        "CISPO": spec.surrogate is Surrogate.CISPO,
    }


def _bounds(spec: PolicyLossSpec) -> tuple[float, float, float]:
    return 1 - spec.clip_low, 1 + spec.clip_high, spec.clip_ratio_c
