"""Proof that a push arrived: every rectangle is counted and summed up where it was read and where it was written."""

from __future__ import annotations

from collections.abc import Sequence
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
    rows = _words(rectangle).sum(1)
    return (rows * _odd_numbers(len(rows), rows.device)).sum()


def _words(matrix: Tensor) -> Tensor:
    size = matrix.element_size()
    if matrix.shape[1] * size % WORD:
        return matrix.contiguous().view(INTEGERS[size])
    is_aligned = matrix.stride(1) == 1 and not (matrix.stride(0) * size % WORD or matrix.storage_offset() * size % WORD)
    return (matrix if is_aligned else matrix.contiguous()).view(torch.int64)


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
    """The tally of one push of rectangles of `sizes` elements, each read on one rank and written on one."""

    def __init__(self, sizes: Tensor) -> None:
        self._sizes = sizes  # [rectangles] int64
        self._sent = torch.zeros_like(sizes)  # checksums
        self._received = sizes.new_zeros(2, len(sizes))  # checksums, elements

    def sent(self, indices: Sequence[int], rectangles: Sequence[Tensor]) -> None:
        """What this rank has read; `indices`: which rectangles of the push these are."""
        if indices:
            self._sent[list(indices)] = _checksums(rectangles)

    def received(self, indices: Sequence[int], rectangles: Sequence[Tensor]) -> None:
        """What lies where this rank has written it."""
        if indices:
            counts = torch.tensor([rectangle.numel() for rectangle in rectangles], device=self._sizes.device)
            self._received[:, list(indices)] = torch.stack([_checksums(rectangles), counts])

    def faults(self) -> list[Fault]:
        """Rectangles that did not arrive whole and as they were, the same on all ranks. Collective."""
        tally = torch.cat([self._sent[None], self._received])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(tally)
        sent, received, counts = tally
        differing = ((sent != received) | (counts != self._sizes)).nonzero()[:, 0]
        rows = zip(differing.tolist(), tally[:, differing].T.tolist(), strict=True)
        return [Fault(index, count, (was, is_)) for index, (was, is_, count) in rows]


def _checksums(rectangles: Sequence[Tensor]) -> Tensor:
    return torch.stack([checksum(rectangle) for rectangle in rectangles])
