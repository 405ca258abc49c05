"""How context parallelism cuts packed sequences."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def zigzag_positions(bounds: Sequence[int], size: int, rank: int) -> Tensor:
    """Positions of the packed sequences that context-parallel rank `rank` of `size` holds, in its order.

    Megatron and Transformer Engine cut every sequence into 2 * size equal chunks and give rank r the chunks r and
    2 * size - 1 - r, so that every rank has the same share of the causal triangle. `bounds` are the sequences' limits,
    each length a multiple of 2 * size.
    """
    owned = []
    for start, stop in pairwise(bounds):
        chunks = torch.arange(start, stop).chunk(2 * size)
        owned += [chunks[rank], chunks[2 * size - 1 - rank]]
    return torch.cat(owned)
