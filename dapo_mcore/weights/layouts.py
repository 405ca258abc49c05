"""How one Megatron parameter is made of Hugging Face tensors, and how it is cut over tensor-parallel ranks.

Every layout is a value with four pure functions. For any number of ranks that divides it,

    to_hf(to_mcore(tensors)) == tensors        join([cut(full, rank, size) for rank in range(size)]) == full

bit for bit. Results may be views of their arguments; nothing is written in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, ...]


class Layout(Protocol):
    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        """Of the Hugging Face tensors, in the order in which `to_mcore` takes them."""
        ...

    @property
    def full_shape(self) -> Shape:
        """Of the Megatron parameter before it is cut."""
        ...

    @property
    def is_cut(self) -> bool:
        """False: every rank holds the whole parameter."""
        ...

    def to_mcore(self, tensors: Sequence[Tensor]) -> Tensor: ...

    def to_hf(self, full: Tensor) -> tuple[Tensor, ...]: ...

    def cut(self, full: Tensor, rank: int, size: int) -> Tensor: ...

    def join(self, shards: Sequence[Tensor]) -> Tensor: ...


def even_part(tensor: Tensor, rank: int, size: int, dim: int) -> Tensor:
    """Part `rank` of `size` equal parts along `dim`, as a view."""
    length, remainder = divmod(tensor.shape[dim], size)
    if remainder:
        shape = list(tensor.shape)
        raise ValueError(
            f"a weight of shape {shape} cannot be cut into {size} equal parts along dimension {dim}; "
            f"choose a tensor parallel size that divides {shape[dim]}"
        )
    return tensor.narrow(dim, rank * length, length)


@dataclass(frozen=True, slots=True)
class Whole:
    """The same tensor on both sides and on every rank: norms, router."""

    shape: Shape
    is_cut = False

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        return (self.shape,)

    @property
    def full_shape(self) -> Shape:
        return self.shape

    def to_mcore(self, tensors: Sequence[Tensor]) -> Tensor:
        (full,) = tensors
        return full

    def to_hf(self, full: Tensor) -> tuple[Tensor, ...]:
        return (full,)

    def cut(self, full: Tensor, rank: int, size: int) -> Tensor:
        return full

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        return shards[0]


@dataclass(frozen=True, slots=True)
class Even:
    """The same tensor on both sides, cut evenly along `dim`: 0 for column-parallel, 1 for row-parallel layers."""

    shape: Shape
    dim: int
    is_cut = True

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        return (self.shape,)

    @property
    def full_shape(self) -> Shape:
        return self.shape

    def to_mcore(self, tensors: Sequence[Tensor]) -> Tensor:
        (full,) = tensors
        return full

    def to_hf(self, full: Tensor) -> tuple[Tensor, ...]:
        return (full,)

    def cut(self, full: Tensor, rank: int, size: int) -> Tensor:
        return even_part(full, rank, size, self.dim)

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(shards), self.dim)


@dataclass(frozen=True, slots=True)
class VocabularyRows:
    """One row per token, padded with zero rows to `padded` (a multiple of the ranks), cut by rows."""

    rows: int
    padded: int
    columns: int
    is_cut = True

    def __post_init__(self) -> None:
        if self.padded < self.rows:
            raise ValueError(f"a padded vocabulary of {self.padded} rows cannot hold the model's {self.rows}; build "
                             f"the model with at least {self.rows}")  # fmt: skip

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        return ((self.rows, self.columns),)

    @property
    def full_shape(self) -> Shape:
        return (self.padded, self.columns)

    def to_mcore(self, tensors: Sequence[Tensor]) -> Tensor:
        (table,) = tensors
        missing = self.padded - self.rows
        return F.pad(table, (0, 0, 0, missing)) if missing else table

    def to_hf(self, full: Tensor) -> tuple[Tensor, ...]:
        return (full[: self.rows],)

    def cut(self, full: Tensor, rank: int, size: int) -> Tensor:
        return even_part(full, rank, size, 0)

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(shards), 0)


@dataclass(frozen=True, slots=True)
class GroupedQKV:
    """q, k, v interleaved: for each group its query heads, its key head, its value head; cut evenly by rows.

    `tail` is (hidden,) for the weight and () for the bias. With fewer groups than ranks the same even cut runs through
    a group; Megatron then gathers activations.
    """

    heads: int
    groups: int
    head_dim: int
    tail: Shape
    is_cut = True

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        query, key = self.heads * self.head_dim, self.groups * self.head_dim
        return ((query, *self.tail), (key, *self.tail), (key, *self.tail))

    @property
    def full_shape(self) -> Shape:
        return ((self.heads + 2 * self.groups) * self.head_dim, *self.tail)

    def to_mcore(self, tensors: Sequence[Tensor]) -> Tensor:
        grouped = [tensor.unflatten(0, (self.groups, -1)) for tensor in tensors]
        return torch.cat(grouped, 1).flatten(0, 1)

    def to_hf(self, full: Tensor) -> tuple[Tensor, ...]:
        grouped = full.unflatten(0, (self.groups, -1))
        query = self.heads // self.groups * self.head_dim
        parts = grouped.split([query, self.head_dim, self.head_dim], dim=1)
        return tuple(part.flatten(0, 1) for part in parts)

    def cut(self, full: Tensor, rank: int, size: int) -> Tensor:
        return even_part(full, rank, size, 0)

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(shards), 0)


@dataclass(frozen=True, slots=True)
class GateUp:
    """Gate over up, [2 * rows, columns]; a rank holds its part of gate over its part of up."""

    rows: int
    columns: int
    is_cut = True

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        return ((self.rows, self.columns), (self.rows, self.columns))

    @property
    def full_shape(self) -> Shape:
        return (2 * self.rows, self.columns)

    def to_mcore(self, tensors: Sequence[Tensor]) -> Tensor:
        gate, up = tensors
        return torch.cat([gate, up])

    def to_hf(self, full: Tensor) -> tuple[Tensor, ...]:
        return full[: self.rows], full[self.rows :]

    def cut(self, full: Tensor, rank: int, size: int) -> Tensor:
        return full if size == 1 else torch.cat([even_part(half, rank, size, 0) for half in self.to_hf(full)])

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return shards[0] if len(shards) == 1 else torch.cat([*gates, *ups])
