"""Losses on the router's logits that keep experts in use and logits small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Weights:
    """Of the losses of one update, whose responses and tokens are counted over all micro-batches and ranks."""

    aux: float  # coefficient
    z: float  # coefficient
    per_response: float  # 1 / responses
    per_token: float  # 1 / prompt and response tokens

    def total(self, aux: Tensor, z: Tensor) -> Tensor:
        return self.aux * self.per_response * aux + self.z * self.per_token * z


def balance_terms(
    logits: Tensor, response: Tensor, lengths: Tensor, topk: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """This rank's part of two sums, 0-d each; the ranks' parts add up, and so do their gradients.

    The first is the sum over responses of the sequence-wise balance loss (DeepSeek-V3, arXiv:2412.19437, eq. 17-20):
    experts * sum_i f_i P_i, with f_i the share of the response's choices that fall on expert i (no gradient) and P_i
    the mean of its softmax probability. It is 1 under perfect balance. The second is the sum over tokens of the z-loss,
    logsumexp(logits) squared (ST-MoE, arXiv:2202.08906, eq. 5).

    Args:
        logits: [T, experts], of the tokens of this rank.
        response: [T] int64, number of each token's response; len(lengths) for padding, which takes no part.
        lengths: [responses] int64, tokens of each on all ranks of `group` together.
        topk: experts per token.
        group: ranks that hold other tokens of the same responses.
    """
    experts, real = logits.shape[-1], response < len(lengths)
    logits, response = logits[real].float(), response[real]
    probabilities = logits.softmax(-1)
    choices = torch.zeros_like(probabilities).scatter_(1, probabilities.detach().topk(topk, 1).indices, 1.0)
    count = probabilities.new_zeros(len(lengths), experts).index_add_(0, response, choices)
    if group.size() > 1:
        dist.all_reduce(count, group=group)
    length = lengths[:, None].to(count.dtype)
    share = count / (topk * length)
    mean = torch.zeros_like(count).index_add(0, response, probabilities) / length
    return experts * (share * mean).sum(), logits.logsumexp(-1).square().sum()


def with_loss(logits: Tensor, loss: Tensor) -> Tensor:
    """The same logits, whose backward adds the gradient of `loss`."""
    return _WithLoss.apply(logits, loss)


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Tensor) -> Tensor:
        ctx.like = (loss.dtype, loss.device)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.like
        return gradients[0], torch.ones((), dtype=dtype, device=device)
