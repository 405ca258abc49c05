"""The walk over chunks of tokens: logits, statistics, gradient, and nothing of size [T, V] alive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dapo_kernels.policy import TokenInputs, bonus_weights
from dapo_kernels.shard import Merge, RowStatistics, VocabShard
from dapo_kernels.spec import PolicyLossSpec

CHUNK_BYTES = {"cpu": 32 << 20}  # of logits alive at once
ACCELERATOR_CHUNK_BYTES = 1200 << 20
ALIGNED_COLUMNS = 64
ROW_MULTIPLE = 128  # rows per chunk are a multiple of it where they can be: whole tiles of the matrix units


@dataclass(frozen=True, slots=True)
class RowKernels:
    """What a backend computes on the rows of a chunk of logits [n, V].

    statistics(logits, columns, inverse_temperature) -> RowStatistics of these columns. May overwrite the logits.
    token_terms(merged statistics, tokens, spec) -> logprobs, entropy, d loss / d logprobs, [n] each.
    gradient(logits, columns, local, merged, derivative, bonus, inverse_temperature, sources, dtype) -> [k, V]:
        row i is derivative (onehot - p) + bonus p (log p + H), times inverse_temperature, of row sources[i]; `bonus` is
        [n] or None. It may lie in the logits' memory: sources[i] is i, or a row from behind k while row i itself is not
        wanted.
    scale_in_place(values, factor): values *= factor, 0-d.
    loss_from_logits: the whole loss without chunks, where the backend has it (see triton_rows).
    """

    statistics: Callable[[Tensor, Tensor, float], RowStatistics]
    token_terms: Callable[[RowStatistics, TokenInputs, PolicyLossSpec], tuple[Tensor, Tensor, Tensor]]
    gradient: Callable[..., Tensor]
    scale_in_place: Callable[[Tensor, Tensor], None]
    loss_from_logits: Callable[..., tuple[Tensor, Tensor]] | None = None


class Head(Protocol):
    """Where logits come from and where their gradient goes. Rows are counted among the unmasked tokens."""

    @property
    def wants_gradient(self) -> bool: ...

    @property
    def gradient_dtype(self) -> torch.dtype: ...

    def buffer(self, rows: int) -> Tensor:
        """Memory for the logits of one chunk."""
        ...

    def logits(self, span: slice, buffer: Tensor) -> Tensor:
        """[n, V] of the rows in `span`; may be overwritten."""
        ...

    def accept(self, rows: Tensor, dlogits: Tensor) -> None:
        """Takes d loss / d logits [k, V] of `rows` [k]; all other rows have none."""


@dataclass(frozen=True, slots=True)
class Walk:
    """Everything a chunk needs besides its rows."""

    head: Head
    kernels: RowKernels
    targets: Tensor  # [n] global ids
    tokens: TokenInputs | None  # None: no gradient is wanted
    spec: PolicyLossSpec
    shard: VocabShard
    logprobs: Tensor  # [n], written
    entropy: Tensor  # [n], written

    def run(self, rows_per_chunk: int) -> None:
        """Under tensor parallelism chunk i's all-reduces run beside the logits and statistics of chunk i + 1."""
        buffers = [self.head.buffer(rows_per_chunk) for _ in range(2 if self.shard.is_split else 1)]
        previous: _Chunk | None = None
        for index, first in enumerate(range(0, len(self.targets), rows_per_chunk)):
            span = slice(first, min(first + rows_per_chunk, len(self.targets)))
            logits = self.head.logits(span, buffers[index % len(buffers)])
            if previous is not None:
                previous.merge.start_sums()
            chunk = _Chunk(self, span, logits)
            if previous is not None:
                previous.finish()
            previous = chunk
            if not self.shard.is_split:
                chunk.merge.start_sums()
                chunk.finish()
                previous = None
        if previous is not None:
            previous.merge.start_sums()
            previous.finish()


class _Chunk:
    def __init__(self, walk: Walk, span: slice, logits: Tensor) -> None:
        self.walk, self.span, self.logits = walk, span, logits
        self.columns = walk.shard.local(walk.targets[span])
        if logits.shape[1] == 0:
            self.local = RowStatistics.of_no_columns(logits.shape[0], walk.logprobs)
        else:
            self.local = walk.kernels.statistics(logits, self.columns, 1 / walk.spec.temperature)
        self.merge = Merge(self.local, walk.shard)

    def finish(self) -> None:
        walk, merged, span = self.walk, self.merge.finish(), self.span
        if walk.tokens is None:
            walk.logprobs[span], walk.entropy[span] = merged.logprobs, merged.entropy
            return
        tokens = walk.tokens.select(span)
        walk.logprobs[span], walk.entropy[span], derivative = walk.kernels.token_terms(merged, tokens, walk.spec)
        bonus = bonus_weights(derivative, tokens, walk.spec)
        active = derivative != 0 if bonus is None else (derivative != 0) | (bonus != 0)
        count, missing = torch.stack([active.sum(), (merged.held == 0).sum()]).tolist()
        refuse_missing_targets(missing)
        if not walk.head.wants_gradient or count == 0:
            return
        sources = fill_holes(active, count)
        if self.logits.shape[1] == 0:
            dlogits = self.logits[:count].to(walk.head.gradient_dtype)
        else:
            dlogits = walk.kernels.gradient(
                self.logits, self.columns, self.local, merged, derivative, bonus,
                1 / walk.spec.temperature, sources, walk.head.gradient_dtype)  # fmt: skip
        walk.head.accept(sources + span.start, dlogits)


def fill_holes(active: Tensor, count: int) -> Tensor:
    """Where each of the first `count` rows takes its content from once the active rows [n] are moved together.

    An active row stays; an inactive one is filled with an active row from behind `count`, so no row that is read is
    written by another. Needs no synchronisation.
    """
    stays = active[:count]
    own = torch.arange(count, device=active.device)
    if count == len(active):
        return own
    behind = torch.argsort((~active[count:]).to(torch.uint8), stable=True) + count
    hole = (torch.cumsum(~stays, 0) - 1).clamp_(0, len(behind) - 1)
    return torch.where(stays, own, behind[hole])


def refuse_missing_targets(missing: int) -> None:
    if missing:
        raise ValueError(
            f"targets: {missing} unmasked ids of [T] lie in no shard of the vocabulary; expected global ids below "
            "the vocabulary's size, and vocab_start the first id of this rank's shard"
        )


def chunk_buffer(like: Tensor, rows: int, columns: int) -> Tensor:
    """Uninitialised [rows, columns] in the accumulator's type; rows begin at aligned addresses, as fast GEMMs want."""
    padded = -(-columns // ALIGNED_COLUMNS) * ALIGNED_COLUMNS
    return like.new_empty(rows, padded, dtype=torch.promote_types(like.dtype, torch.float32))[:, :columns]


def rows_per_chunk(columns: int, element_bytes: int, device: torch.device, buffers: int) -> int:
    budget = CHUNK_BYTES.get(device.type, ACCELERATOR_CHUNK_BYTES)
    rows = max(1, budget // (max(columns, 1) * element_bytes * buffers))
    return rows if rows < ROW_MULTIPLE else rows // ROW_MULTIPLE * ROW_MULTIPLE
