"""Advantages of responses from their rewards. One reward per response, and its advantage for every token alike.

An estimator maps rewards [S] float32 (NaN: could not be graded), the group of each response [S] int64 and the number of
its trained tokens [S] int64 to advantages [S] float32. A response without a grade gets 0 and counts in no statistic.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EPSILON = 1e-6  # added to the standard deviation, outside the root
WHITENING_EPSILON = 1e-8  # added to the variance, inside the root

Estimator = Callable[[Tensor, Tensor, Tensor], Tensor]


def per_group(of_group: Callable[[Tensor], Tensor]) -> Estimator:
    """The estimator that looks at one group's graded rewards [G] at a time, whatever their lengths."""

    def estimate(rewards: Tensor, groups: Tensor, trained_tokens: Tensor) -> Tensor:
        advantages = torch.zeros(len(rewards))
        for group in groups.unique():
            members = (groups == group) & ~rewards.isnan()
            advantages[members] = of_group(rewards[members])
        return advantages

    return estimate


def group_advantages(rewards: Tensor, normalize_by_std: bool = True, ddof: int = 1) -> Tensor:
    """(R - mean) / (std + 1e-6) over the group, eq. 9 and GRPO (arXiv:2402.03300): [G] -> [G] float32.

    `ddof` 1 is the unbiased standard deviation, 0 the population's; the paper does not say which. Without
    `normalize_by_std` the difference to the mean (Dr.GRPO, arXiv:2503.20783). Equal rewards give exactly 0.
    """
    if rewards.unique().numel() < 2:
        return torch.zeros_like(rewards, dtype=torch.float32)
    rewards = rewards.double()
    centred = rewards - rewards.mean()
    scale = rewards.std(correction=ddof) + EPSILON if normalize_by_std else 1.0
    return (centred / scale).float()


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    """R minus the mean of the group's other rewards: [G] -> [G] float32. RLOO, arXiv:2402.14740.

    The difference to the mean of the whole group, times G / (G - 1). Equal rewards give exactly 0.
    """
    size = len(rewards)
    return group_advantages(rewards, normalize_by_std=False) * (size / max(size - 1, 1))


def whitened_group_differences(rewards: Tensor, groups: Tensor, trained_tokens: Tensor) -> Tensor:
    """R minus its group's mean, whitened over all trained tokens of the batch: REINFORCE++ baseline, arXiv:2501.03262.

    Mean and unbiased variance count a response once per trained token, as verl's do; 1e-8 is added inside the root.
    """
    centred = per_group(lambda r: group_advantages(r, normalize_by_std=False))(rewards, groups, trained_tokens).double()
    count = int(trained_tokens.sum())
    if count < 2:
        return torch.zeros(len(rewards))
    mean = (centred * trained_tokens).sum() / count
    variance = ((centred - mean).square() * trained_tokens).sum() / (count - 1)
    whitened = (centred - mean) * (variance + WHITENING_EPSILON).rsqrt()
    return torch.where(rewards.isnan(), 0.0, whitened).float()
