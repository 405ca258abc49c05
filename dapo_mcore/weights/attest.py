"""Proof that a push arrived: every rectangle is counted and summed up where it was read and where it was written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

WORD = 8  # bytes
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class AttestationError(RuntimeError):
    """The rollout engine does not hold the policy's weights. Raised on every rank."""


def checksum(rectangle: Tensor) -> Tensor:
    """0-dimensional int64: the sum over the words of a matrix, those of row r times 2 r + 1, modulo 2^64.

    Words are of 8 bytes, or single elements where a row is no multiple of that; which of both depends on nothing but
    shape and dtype, so that equal matrices have equal checksums however they lie in memory. One changed byte always
    changes it: a weight is odd. So do two rows that were exchanged, unless they have the same sum.
    """
    rows = _row_sums(rectangle)
    return (rows * _odd_numbers(len(rows), rows.device)).sum()


def _row_sums(matrix: Tensor) -> Tensor:
    size = matrix.element_size()
    stride, step = matrix.stride()
    if matrix.shape[1] * size % WORD:
        return matrix.contiguous().view(INTEGERS[size]).sum(1)
    is_aligned = step == 1 and not (stride * size % WORD or matrix.storage_offset() * size % WORD)
    return (matrix if is_aligned else matrix.contiguous()).view(torch.int64).sum(1)


@lru_cache(maxsize=64)
def _odd_numbers(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device) * 2 + 1


@dataclass(frozen=True, slots=True)
class Fault:
    """A rectangle that is not where it belongs as it was sent."""

    index: int
    received: int  # elements
    checksums: tuple[int, int]  # where it was read, where it was written


class Attestation:
    """The tally of one push of rectangles of `sizes` elements, each read on one rank and written on one.

    Rectangles are summed up row by row as they come, while a processor's cache still has them, and in the end all of
    one height are weighted at once. Until then their sums take 8 bytes per row.
    """

    def __init__(self, sizes: Tensor) -> None:
        self._sizes = sizes  # [rectangles] int64
        self._sent: dict[int, Tensor] = {}  # index -> sums of rows
        self._received: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}  # index -> elements received
        self._read: dict[int, Tensor] = {}  # id of the tensor -> sums: what goes to several ranks is summed up once

    def sent(self, rectangles: Iterable[tuple[int, Tensor]]) -> None:
        """What this rank has read, each with its index in the push. The tensors are kept as they are until `faults`."""
        for index, rectangle in rectangles:
            rows = self._read.get(id(rectangle))
            self._sent[index] = self._read[id(rectangle)] = _row_sums(rectangle) if rows is None else rows

    def received(self, rectangles: Iterable[tuple[int, Tensor]]) -> None:
        """What lies where this rank has written it, likewise."""
        for index, rectangle in rectangles:
            self._received[index] = _row_sums(rectangle)
            self._counts[index] = rectangle.numel()

    def faults(self) -> list[Fault]:
        """Rectangles that did not arrive whole and as they were, the same on all ranks. Collective."""
        tally = self._sizes.new_zeros(3, len(self._sizes))
        _add_up(self._sent, tally[0])
        _add_up(self._received, tally[1])
        tally[2, list(self._counts)] = tally.new_tensor(list(self._counts.values()))
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(tally)
        sent, received, counts = tally
        differing = ((sent != received) | (counts != self._sizes)).nonzero()[:, 0]
        rows = zip(differing.tolist(), tally[:, differing].T.tolist(), strict=True)
        return [Fault(index, count, (was, is_)) for index, (was, is_, count) in rows]


def _add_up(sums: dict[int, Tensor], checksums: Tensor) -> None:
    """The checksum of every rectangle, by index, from the sums of its rows."""
    heights: dict[int, list[int]] = defaultdict(list)
    for index, rows in sums.items():
        heights[len(rows)].append(index)
    for height, indices in heights.items():
        rows = torch.stack([sums[index] for index in indices])
        checksums[indices] = (rows * _odd_numbers(height, rows.device)).sum(1)
