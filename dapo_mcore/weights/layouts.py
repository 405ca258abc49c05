"""How a parameter is made of Hugging Face tensors, in Megatron and in vLLM, and how it is cut over their ranks.

A layout declares the rectangles of Hugging Face tensors that lie on a rank; everything else follows from them. For any
number of ranks that divides it,

    to_hf(to_mcore(tensors)) == tensors        join([cut(full, rank, size) for rank in range(size)]) == full

bit for bit, padding being zero. Results may be views of their arguments; nothing is written in place.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dapo_mcore.weights.boxes import Box, Shape, Shard, between, even_part, matrix, stacked, whole

if TYPE_CHECKING:  # the plan of a push is made without torch
    from torch import Tensor

VLLM_VOCABULARY = 64  # vLLM pads the rows of an embedding to a multiple of this


class Layout(ABC):
    __slots__ = ()
    is_cut = True  # False: every rank holds the whole parameter

    @property
    @abstractmethod
    def hf_shapes(self) -> tuple[Shape, ...]:
        """Of the Hugging Face tensors, in the order in which `to_mcore` takes them."""
        ...

    @abstractmethod
    def mcore(self, rank: int, size: int) -> Shard:
        """What Megatron's rank of `size` holds, as boxes of the Hugging Face tensors."""
        ...

    def vllm(self, rank: int, size: int) -> Shard:
        """What vLLM's rank of `size` holds, likewise."""
        return self.mcore(rank, size)

    @property
    def full_shape(self) -> Shape:
        """Of the Megatron parameter before it is cut."""
        return self.mcore(0, 1).shape

    def to_mcore(self, tensors: Sequence[Tensor]) -> Tensor:
        return assembled(self.mcore(0, 1), tensors)

    def to_hf(self, full: Tensor) -> tuple[Tensor, ...]:
        held = (self.mcore(0, 1),)
        wanted = (whole(shape, index) for index, shape in enumerate(self.hf_shapes))
        return tuple(assembled(between(shard, held), [full]) for shard in wanted)

    def cut(self, full: Tensor, rank: int, size: int) -> Tensor:
        return assembled(between(self.mcore(rank, size), (self.mcore(0, 1),)), [full])

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        size = len(shards) if self.is_cut else 1
        held = tuple(self.mcore(rank, size) for rank in range(size))
        return assembled(between(self.mcore(0, 1), held), shards)


def assembled(shard: Shard, tensors: Sequence[Tensor]) -> Tensor:
    """The tensor that a shard describes, out of its sources: a view if it is one rectangle, else new memory."""
    if len(shard.boxes) == 1 and shard.boxes[0].shape == matrix(shard.shape):
        (box,) = shard.boxes
        return rectangle(tensors[box.tensor], box.source, box.shape).reshape(shard.shape)
    new = tensors[0].new_empty if shard.size == math.prod(shard.shape) else tensors[0].new_zeros
    result = new(shard.shape)
    for box in shard.boxes:
        rectangle(result, box.at, box.shape).copy_(rectangle(tensors[box.tensor], box.source, box.shape))
    return result


def rectangle(tensor: Tensor, at: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """A view [rows, columns] of a tensor that counts as a matrix; with more than two dimensions it is contiguous."""
    rows = tensor.flatten(1) if tensor.dim() > 1 else tensor.unsqueeze(1)
    return rows.narrow(0, at[0], shape[0]).narrow(1, at[1], shape[1])


@dataclass(frozen=True, slots=True)
class Whole(Layout):
    """The same tensor on both sides and on every rank: norms, router."""

    shape: Shape
    is_cut = False

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        return (self.shape,)

    def mcore(self, rank: int, size: int) -> Shard:
        return whole(self.shape)


@dataclass(frozen=True, slots=True)
class Even(Layout):
    """The same tensor on both sides, cut evenly along `dim`: 0 for column-parallel, 1 for row-parallel layers."""

    shape: Shape
    dim: int

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        return (self.shape,)

    def mcore(self, rank: int, size: int) -> Shard:
        return even_part(whole(self.shape), rank, size, self.dim)


@dataclass(frozen=True, slots=True)
class VocabularyRows(Layout):
    """One row per token, cut by rows; rows of padding after them.

    Megatron's table has `padded` rows, a multiple of the ranks; vLLM's the next multiple of 64.
    """

    rows: int
    padded: int
    columns: int

    def __post_init__(self) -> None:
        if self.padded < self.rows:
            raise ValueError(f"a padded vocabulary of {self.padded} rows cannot hold the model's {self.rows}; build "
                             f"the model with at least {self.rows}")  # fmt: skip

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        return ((self.rows, self.columns),)

    def mcore(self, rank: int, size: int) -> Shard:
        return self._table(self.padded, rank, size)

    def vllm(self, rank: int, size: int) -> Shard:
        return self._table(self.rows + -self.rows % VLLM_VOCABULARY, rank, size)

    def _table(self, padded: int, rank: int, size: int) -> Shard:
        table = Box(0, (0, 0), (0, 0), (self.rows, self.columns))
        return even_part(Shard((padded, self.columns), (table,)), rank, size, 0)


@dataclass(frozen=True, slots=True)
class GroupedQKV(Layout):
    """q, k, v of attention; `tail` is (hidden,) for the weight and () for the bias.

    Megatron interleaves them: for each group its query heads, its key head, its value head; cut evenly by rows. With
    fewer groups than ranks the same even cut runs through a group; Megatron then gathers activations. A rank of vLLM
    holds its query heads, then its key heads, then its value heads, or the one head of each that its queries share with
    other ranks.
    """

    heads: int
    groups: int
    head_dim: int
    tail: Shape

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        query, key = self.heads * self.head_dim, self.groups * self.head_dim
        return ((query, *self.tail), (key, *self.tail), (key, *self.tail))

    def mcore(self, rank: int, size: int) -> Shard:
        query, key = self.heads // self.groups * self.head_dim, self.head_dim
        rows = (query, key, key)
        spans = ((part, group * rows[part], rows[part]) for group in range(self.groups) for part in range(3))
        return even_part(stacked(spans, self.tail), rank, size, 0)

    def vllm(self, rank: int, size: int) -> Shard:
        replicas = max(size // self.groups, 1)  # ranks that hold the same key head
        key_ranks = size // replicas
        if self.heads % size or key_ranks * replicas != size or self.groups % key_ranks:
            raise ValueError(
                f"vLLM cannot cut {self.heads} query heads and {self.groups} key-value heads over {size} ranks; choose "
                f"a tensor parallel size that divides {self.heads} and divides {self.groups} or is a multiple of it"
            )
        query, key = (heads * self.head_dim for heads in (self.heads // size, self.groups // key_ranks))
        shared = rank // replicas
        return stacked(((0, rank * query, query), (1, shared * key, key), (2, shared * key, key)), self.tail)


@dataclass(frozen=True, slots=True)
class GateUp(Layout):
    """Gate over up, [2 * rows, columns]; a rank holds its part of gate over its part of up."""

    rows: int
    columns: int

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        return ((self.rows, self.columns), (self.rows, self.columns))

    def mcore(self, rank: int, size: int) -> Shard:
        gate, up = (even_part(whole(shape, i), rank, size, 0).boxes[0] for i, shape in enumerate(self.hf_shapes))
        return stacked(((box.tensor, box.source[0], box.shape[0]) for box in (gate, up)), (self.columns,))
