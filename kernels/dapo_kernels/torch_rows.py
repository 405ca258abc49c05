"""Rows of logits in plain torch: softmax statistics, then the gradient in the same memory. Any device, any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from dapo_kernels.policy import TokenInputs, token_loss_derivative
from dapo_kernels.shard import LOWEST, RowStatistics
from dapo_kernels.spec import PolicyLossSpec

BLOCKS = 8  # a chunk is exponentiated in so many steps, so that the temporary is a fraction of it


def statistics(logits: Tensor, columns: Tensor, inverse_temperature: float) -> RowStatistics:
    """Overwrites logits [n, V] with exp(z - peak), z = logits * inverse_temperature; columns [n]: target or -1."""
    if inverse_temperature != 1.0:
        logits.mul_(inverse_temperature)
    peak = logits.amax(dim=-1).clamp_(min=LOWEST)
    held = columns >= 0
    target = logits.gather(1, columns.clamp(min=0)[:, None])[:, 0] - peak
    weighted = torch.empty_like(peak)
    rows = -(-logits.shape[0] // BLOCKS)
    for first in range(0, logits.shape[0], max(rows, 1)):
        block = slice(first, first + rows)
        shifted = (logits[block] - peak[block, None]).clamp_(min=LOWEST)
        exponentials = torch.exp(shifted, out=logits[block])
        weighted[block] = torch.bmm(exponentials[:, None, :], shifted[:, :, None])[:, 0, 0]
    return RowStatistics(peak, logits.sum(dim=-1), weighted, torch.where(held, target, 0.0), held.to(peak))


def token_terms(merged: RowStatistics, tokens: TokenInputs, spec: PolicyLossSpec) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, entropy and d loss / d logprobs, [n] each, from statistics over the whole vocabulary."""
    logprobs = merged.logprobs
    return logprobs, merged.entropy, token_loss_derivative(logprobs, tokens, spec)


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
    """d loss / d logits [k, V] of the rows `sources` [k], made in the memory of the first k rows; see `RowKernels`."""
    count = len(sources)
    moved = (sources != torch.arange(count, device=sources.device)).nonzero()[:, 0]
    logits[moved] = logits[sources[moved]]
    output = logits[:count]
    to_probability = ((local.peak - merged.peak).exp() / merged.sum_exp)[sources]
    derivative = derivative[sources] * inverse_temperature
    if bonus is None:
        output.mul_((-derivative * to_probability)[:, None])
    else:
        output.mul_(to_probability[:, None])
        p_log_p = torch.special.xlogy(output, output)
        bonus = bonus[sources] * inverse_temperature
        output.mul_((bonus * merged.entropy[sources] - derivative)[:, None]).addcmul_(p_log_p, bonus[:, None])
    columns = columns[sources]
    output.scatter_add_(1, columns.clamp(min=0)[:, None], torch.where(columns >= 0, derivative, 0.0)[:, None])
    return output.to(dtype)


def scale_in_place(values: Tensor, factor: Tensor) -> None:
    values.mul_(factor)
