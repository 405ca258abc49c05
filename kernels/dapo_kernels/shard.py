"""Softmax statistics of rows whose vocabulary is spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

LOWEST = -1e30  # stands for -inf where 0 * -inf would be NaN; exp of it is 0


@dataclass(frozen=True, slots=True)
class VocabShard:
    """This rank's part of the vocabulary: the global ids [start, start + columns)."""

    start: int
    columns: int  # without the padding behind the real vocabulary; may be 0
    group: dist.ProcessGroup | None

    @property
    def is_split(self) -> bool:
        return self.group is not None and dist.get_world_size(self.group) > 1

    def local(self, targets: Tensor) -> Tensor:
        """Global ids [n] as columns of this shard; -1 where another rank holds the id."""
        column = targets - self.start
        return torch.where((column >= 0) & (column < self.columns), column, -1)


@dataclass(frozen=True, slots=True)
class RowStatistics:
    """Of rows z [n, columns] of scaled logits, all [n]."""

    peak: Tensor  # max z, at least LOWEST
    sum_exp: Tensor  # sum of exp(z - peak)
    weighted: Tensor  # sum of exp(z - peak) (z - peak)
    target: Tensor  # z[target] - peak where held, otherwise 0
    held: Tensor  # 1 where the target is one of these columns, otherwise 0

    @property
    def logprobs(self) -> Tensor:
        """NaN where no shard holds the target."""
        return torch.where(self.held > 0, self.target - self.sum_exp.log(), torch.nan)

    @property
    def entropy(self) -> Tensor:
        return self.sum_exp.log() - self.weighted / self.sum_exp

    @staticmethod
    def of_no_columns(rows: int, like: Tensor) -> RowStatistics:
        zeros = like.new_zeros(rows)
        return RowStatistics(zeros + LOWEST, zeros, zeros, zeros, zeros)


class Merge:
    """The statistics of all shards together: five floats per row in two all-reduces, each free to overlap other work.

    Call `start_sums` after the first and `finish` after the second stretch of work.
    """

    def __init__(self, local: RowStatistics, shard: VocabShard) -> None:
        self.local = local
        self.group = shard.group if shard.is_split else None
        self._peak = local.peak.clone() if self.group else local.peak
        self._pending = self._all_reduce(self._peak, dist.ReduceOp.MAX)

    def start_sums(self) -> None:
        if self._pending is None:
            return
        self._pending.wait()
        shift = self.local.peak - self._peak
        factor, local = shift.exp(), self.local
        weighted = factor * (local.weighted + shift * local.sum_exp)
        target = torch.where(local.held > 0, local.target + shift, 0.0)
        self._sums = torch.stack([factor * local.sum_exp, weighted, target, local.held])
        self._pending = self._all_reduce(self._sums, dist.ReduceOp.SUM)

    def finish(self) -> RowStatistics:
        if self._pending is None:
            return self.local
        self._pending.wait()
        return RowStatistics(self._peak, *self._sums.unbind())

    def _all_reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> dist.Work | None:
        if self.group is None:
            return None
        return dist.all_reduce(values, operation, self.group, async_op=True)
