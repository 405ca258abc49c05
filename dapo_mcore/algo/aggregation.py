"""How the losses of tokens become one number: a weight for every token, and one denominator for the mini-batch.

Both are known before the first forward and depend on the mini-batch alone, so no split of it into micro-batches or over
ranks can change the loss. Responses without a trained token count nowhere, as in verl.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dapo_mcore.types import TrainBatch


class Weighting(NamedTuple):
    """The loss is the sum of weights * token losses over the trained tokens, divided by the denominator."""

    weights: Tensor  # [N] float32; of everything a token adds: policy term, KL penalty and entropy bonus
    denominator: float  # above 0 when the mini-batch has a trained token


Aggregation = Callable[[TrainBatch], Weighting]


def token_mean(batch: TrainBatch) -> Weighting:
    """Every trained token of the mini-batch counts alike (DAPO, arXiv:2503.14476, eq. 8)."""
    return Weighting(torch.ones(len(batch.loss_mask)), batch.num_loss_tokens)


def seq_mean_token_sum(batch: TrainBatch) -> Weighting:
    """The mean over responses of the sum over their tokens: the plain policy gradient of a response."""
    return Weighting(torch.ones(len(batch.loss_mask)), _trained_responses(batch))


def seq_mean_token_mean(batch: TrainBatch) -> Weighting:
    """The mean over responses of the mean over their tokens (GRPO, arXiv:2402.03300)."""
    lengths = batch.trained_lengths.clamp(min=1)
    return Weighting((1.0 / lengths).repeat_interleave(batch.response_lengths), _trained_responses(batch))


def token_sum_norm(batch: TrainBatch, scale_factor: int) -> Weighting:
    """The mean over responses of their sum over a constant, `scale_factor` tokens (Dr.GRPO, arXiv:2503.20783).

    Unlike a mean it does not weaken the tokens of long responses. verl's seq-mean-token-sum-norm.
    """
    return Weighting(torch.ones(len(batch.loss_mask)), _trained_responses(batch) * scale_factor)


def _trained_responses(batch: TrainBatch) -> int:
    return int((batch.trained_lengths > 0).sum())
