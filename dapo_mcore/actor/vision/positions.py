"""Positions in three dimensions and the rotary embedding of Qwen3-VL (arXiv:2511.21631), interleaved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dapo_mcore.types import VisualSpan


def mrope_positions(length: int, spans: Sequence[VisualSpan]) -> Tensor:
    """[3, length] int64: time, row and column of every token of a sequence with these images.

    Text counts up in all three. An image stands still in time, its rows and columns count from there; what follows
    goes on behind its longer side.
    """
    parts, position, done = [], 0, 0
    for span in spans:
        text = span.start - done
        parts.append(torch.arange(position, position + text).expand(3, -1))
        position += text
        row = torch.arange(span.rows).repeat_interleave(span.columns)
        column = torch.arange(span.columns).repeat(span.rows)
        parts.append(torch.stack([torch.zeros_like(row), row, column]) + position)
        position += max(span.rows, span.columns)
        done = span.start + span.num_tokens
    parts.append(torch.arange(position, position + length - done).expand(3, -1))
    return torch.cat(parts, 1)


class InterleavedRope(torch.nn.Module):
    """Angles for the positions of a whole pack, in place of Megatron's, which knows sections in one piece only.

    As they are as many as the pack has tokens, Megatron takes for each sequence, and each context-parallel rank, its
    own: `megatron.core.models.common.embeddings.rope_utils`, case 1 of packed sequences.
    """

    def __init__(self, head_dim: int, base: float, section: Sequence[int]) -> None:
        super().__init__()
        # No buffers: a model in bf16 would round them.
        self._inverse = base ** -(torch.arange(0, head_dim, 2).float() / head_dim)
        self.axis = torch.zeros(head_dim // 2, dtype=torch.int64)  # of `positions`, by frequency: time, but for these
        for axis in (1, 2):
            self.axis[axis : 3 * section[axis] : 3] = axis

    def forward(self, positions: Tensor, *_: Any, **__: Any) -> Tensor:
        """[3, 1, tokens] -> [tokens, 1, 1, head_dim] float32."""
        axis, inverse = self.axis.to(positions.device), self._inverse.to(positions.device)
        angles = positions[:, 0].float()[axis].t() * inverse
        return torch.cat([angles, angles], -1)[:, None, None]
