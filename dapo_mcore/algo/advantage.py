"""Advantages of responses relative to their group."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6  # added to the standard deviation, outside the root


def group_advantages(rewards: Tensor, normalize_by_std: bool = True, ddof: int = 1) -> Tensor:
    """(R - mean) / (std + 1e-6) over the group, eq. 9: [G] -> [G] float32, for every token of a response alike.

    `ddof` 1 is the unbiased standard deviation, 0 the population's; the paper does not say which. Without
    `normalize_by_std` the difference to the mean (Dr.GRPO, arXiv:2503.20783). Equal rewards give exactly 0.
    """
    if rewards.unique().numel() < 2:
        return torch.zeros_like(rewards, dtype=torch.float32)
    rewards = rewards.double()
    centred = rewards - rewards.mean()
    scale = rewards.std(correction=ddof) + EPSILON if normalize_by_std else 1.0
    return (centred / scale).float()
