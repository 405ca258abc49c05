"""Rewards of a group's responses: the task's score and the length term."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dapo_mcore.types import Group


def overlong_penalty(lengths: Tensor, max_response_length: int, buffer_len: int, penalty_factor: float) -> Tensor:
    """Soft overlong punishment, eq. 13, of responses with `lengths` tokens (prompt not counted): same shape, float32.

    0 up to max_response_length - buffer_len, then linear, -penalty_factor at max_response_length and beyond.
    """
    into_buffer = (lengths - (max_response_length - buffer_len)) / buffer_len
    return -penalty_factor * into_buffer.clamp(0.0, 1.0).float()


def shaped_rewards(group: Group, length_penalty: Callable[[Tensor], Tensor]) -> Tensor:
    """Task score plus length term, [G] float32: what the advantage compares. The group filter must not see it.

    `length_penalty` maps response lengths in tokens, [G] int64, to what is added: eq. 13, or zeros.
    """
    scores = torch.tensor([sample.verdict.score for sample in group.samples], dtype=torch.float32)
    lengths = torch.tensor([len(sample.response.token_ids) for sample in group.samples])
    return scores + length_penalty(lengths)
