"""How context parallelism cuts packed sequences."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

Rows = tuple[int, int]  # first row and the row after the last


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


def causal_pieces(bounds: list[int], size: int, rank: int) -> list[tuple[Rows, Rows]]:
    """(rows of this rank's queries, rows of the whole keys) of each attention problem.

    The last query sees all of the keys, the one before it all but the last, and so on.
    """
    if size == 1:
        return [((a, b), (a, b)) for a, b in pairwise(bounds) if b > a]
    pieces: list[tuple[Rows, Rows]] = []
    for start, stop in pairwise(bounds):
        chunk = (stop - start) // (2 * size)
        first = start // size
        for row, which in ((first, rank), (first + chunk, 2 * size - 1 - rank)):
            pieces.append(((row, row + chunk), (start, start + (which + 1) * chunk)))
    return [piece for piece in pieces if piece[0][1] > piece[0][0]]
