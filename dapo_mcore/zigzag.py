"""How context parallelism cuts packed sequences, and what a rank of it attends to."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
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


class _GatherRows(torch.autograd.Function):
    """[n, ...] on each rank -> [size * n, ...] on all, rank after rank; the gradient is summed back to the owner."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        whole = local.new_empty(group.size() * local.shape[0], *local.shape[1:])
        dist.all_gather_into_tensor(whole, local.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        local = grad.new_empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(local, grad.contiguous(), group=ctx.group)
        return local, None


def whole_rows(local: Tensor, bounds: Sequence[int], group: dist.ProcessGroup, chosen: Sequence[Rows] = ()) -> Tensor:
    """[t, ...], the rows of this rank -> [T, ...], those of all ranks in the order of the sequences.

    Or, of these, the `chosen` stretches, one behind the other; they may overlap.
    """
    places = torch.cat([zigzag_positions(bounds, group.size(), rank) for rank in range(group.size())]).argsort()
    if chosen:
        places = torch.cat([places[start:stop] for start, stop in chosen])
    return _GatherRows.apply(local, group)[places.to(local.device)]
