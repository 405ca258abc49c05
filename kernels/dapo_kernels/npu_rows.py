"""Rows of logits on an Ascend NPU: softmax statistics by its fused cross entropy, the rest as torch_rows."""

from __future__ import annotations

import torch
from torch import Tensor

from dapo_kernels.shard import LOWEST, RowStatistics

OPERATOR = "npu_cross_entropy_loss"  # registered in torch.ops.npu when torch_npu is imported


def is_available() -> bool:
    return hasattr(torch.ops.npu, OPERATOR)


def statistics(logits: Tensor, columns: Tensor, inverse_temperature: float) -> RowStatistics:
    """As torch_rows.statistics, with the logsumexp of a row as its peak: the exponentials are probabilities.

    The operator materialises log-probabilities, so a chunk takes twice its memory.
    """
    if inverse_temperature != 1.0:
        logits.mul_(inverse_temperature)
    held = columns >= 0
    cross_entropy = getattr(torch.ops.npu, OPERATOR)
    losses, logprobs, *_ = cross_entropy(logits, columns.clamp(min=0), reduction="none")
    top, index = logits.max(dim=-1)
    peak = top - logprobs.gather(1, index[:, None])[:, 0]
    probabilities = torch.exp(logprobs.clamp_(min=LOWEST), out=logits)
    weighted = torch.bmm(probabilities[:, None, :], logprobs[:, :, None])[:, 0, 0]
    return RowStatistics(peak, torch.ones_like(peak), weighted, torch.where(held, -losses, 0.0), held.to(peak))
