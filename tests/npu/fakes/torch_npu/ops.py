"""Operators in torch.ops.npu, with the signatures of torch_npu."""

from __future__ import annotations

import torch
from npu_contract import require
from torch import Tensor, library

LIBRARY = library.Library("npu", "DEF")
LIBRARY.define(
    "npu_cross_entropy_loss(Tensor input, Tensor target, Tensor? weight=None, str reduction='mean', "
    "int ignore_index=-100, float label_smoothing=0.0, float lse_square_scale_for_zloss=0.0, bool return_zloss=False) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def cross_entropy(
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
    return loss, logprobs, logits.new_zeros(0), logsumexp


LIBRARY.impl("npu_cross_entropy_loss", cross_entropy, "CompositeExplicitAutograd")
