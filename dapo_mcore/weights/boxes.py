"""Tensors as rectangles of other tensors. Pure geometry: nothing here holds or moves an element.

A tensor of any number of dimensions counts as a matrix: dimension 0 are its rows, the others together its columns; a
vector has one column.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

Shape = tuple[int, ...]
Pair = tuple[int, int]  # of rows and columns: a place or an extent


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of one of several sources, and its place in the tensor that it is a part of."""

    tensor: int  # which source
    source: Pair  # first row, first column there
    at: Pair  # first row, first column in the tensor
    shape: Pair  # rows, columns


@dataclass(frozen=True, slots=True)
class Shard:
    """A tensor as disjoint boxes. Elements in no box are padding."""

    shape: Shape
    boxes: tuple[Box, ...]

    @property
    def size(self) -> int:
        """Elements that are not padding."""
        return sum(math.prod(box.shape) for box in self.boxes)


def matrix(shape: Shape) -> Pair:
    return shape[0], math.prod(shape[1:])


def whole(shape: Shape, tensor: int = 0) -> Shard:
    """A source as it is."""
    return Shard(shape, (Box(tensor, (0, 0), (0, 0), matrix(shape)),))


def stacked(spans: Iterable[tuple[int, int, int]], tail: Shape) -> Shard:
    """Rows of sources under each other; a span is (source, first row, rows), `tail` the shape of a row."""
    boxes: list[Box] = []
    top = 0
    for tensor, first, rows in spans:
        boxes.append(Box(tensor, (first, 0), (top, 0), (rows, math.prod(tail))))
        top += rows
    return Shard((top, *tail), tuple(boxes))


def even_part(shard: Shard, rank: int, size: int, dim: int) -> Shard:
    """Part `rank` of `size` equal parts along dimension 0 or 1. ValueError when there are no equal parts."""
    length, remainder = divmod(shard.shape[dim], size)
    if remainder:
        raise ValueError(
            f"a weight of shape {list(shard.shape)} cannot be cut into {size} equal parts along dimension {dim}; "
            f"choose a tensor parallel size that divides {shard.shape[dim]}"
        )
    shape = (*shard.shape[:dim], length, *shard.shape[dim + 1 :])
    start = (rank * length, 0) if dim == 0 else (0, rank * length)
    window = Box(0, start, (0, 0), matrix(shape))
    parts = ((box.tensor, _common(window, replace(box, source=box.at, at=box.source))) for box in shard.boxes)
    return Shard(shape, tuple(Box(tensor, *part) for tensor, part in parts if part))


@cache
def between(target: Shard, held: tuple[Shard, ...]) -> Shard:
    """`target` as boxes of the tensors `held`, both given as boxes of the same sources.

    The held tensors have no element in common. What none of them holds is in no box of the result.
    """
    parts = (
        (index, _common(box, other))
        for box in target.boxes
        for index, shard in enumerate(held)
        for other in shard.boxes
        if other.tensor == box.tensor
    )
    return Shard(target.shape, _merged([Box(index, *part) for index, part in parts if part]))


def _common(box: Box, other: Box) -> tuple[Pair, Pair, Pair] | None:
    """What two boxes share of their source: its place in the other's tensor, in the first's, and its extent."""
    row, column = max(box.source[0], other.source[0]), max(box.source[1], other.source[1])
    rows = min(box.source[0] + box.shape[0], other.source[0] + other.shape[0]) - row
    columns = min(box.source[1] + box.shape[1], other.source[1] + other.shape[1]) - column
    if rows <= 0 or columns <= 0:
        return None
    there = (other.at[0] + row - other.source[0], other.at[1] + column - other.source[1])
    here = (box.at[0] + row - box.source[0], box.at[1] + column - box.source[1])
    return there, here, (rows, columns)


def _merged(boxes: list[Box]) -> tuple[Box, ...]:
    """The same elements in fewer boxes, by place: neighbours on both sides become one."""
    for axis in (1, 0):
        boxes.sort(key=lambda box: (box.tensor, box.at[1 - axis], box.at[axis]))
        merged: list[Box] = []
        for box in boxes:
            joined = _joined(merged[-1], box, axis) if merged else None
            if joined:
                merged[-1] = joined
            else:
                merged.append(box)
        boxes = merged
    return tuple(sorted(boxes, key=lambda box: box.at))


def _joined(first: Box, second: Box, axis: int) -> Box | None:
    """Both as one box if the second continues the first along `axis` on both sides."""
    step = (first.shape[0], 0) if axis == 0 else (0, first.shape[1])
    follows = all((b[0] - a[0], b[1] - a[1]) == step for a, b in ((first.source, second.source), (first.at, second.at)))
    if not follows or first.tensor != second.tensor or first.shape[1 - axis] != second.shape[1 - axis]:
        return None
    rows, columns = first.shape
    return replace(first, shape=(rows + second.shape[0], columns) if axis == 0 else (rows, columns + second.shape[1]))
