"""Which chunk of which tensor a Megatron rank would write, into which file and where: known before a byte is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from dapo_mcore.weights.boxes import Box, Pair, Shape, Shard, between, matrix
from dapo_mcore.weights.conversion.slots import Slot, slot
from dapo_mcore.weights.conversion.torch_record import ALIGNMENT, LARGEST, frame
from dapo_mcore.weights.families import language_config
from dapo_mcore.weights.layouts import Layout
from dapo_mcore.weights.names import Parameter, parameters
from dapo_mcore.weights.placement import TrainLayout, holders

LARGEST_FILE = 2 << 30  # bytes; smaller files are written in parallel and, after a kill, kept


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of one Hugging Face tensor and its place in the whole Megatron parameter."""

    tensor: int  # -1: padding
    source: Pair
    place: Pair
    extent: Pair


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece as a record of a file."""

    parameter: Parameter
    expert: int
    piece: Piece
    slot: Slot
    sizes: Shape  # with one per leading axis
    offsets: Shape
    dtype: torch.dtype
    start: int  # of the record in the file

    @property
    def length(self) -> int:
        around = frame(self.sizes, self.dtype)
        return len(around.head) + math.prod(self.sizes) * self.dtype.itemsize + len(around.tail)


@dataclass(frozen=True, slots=True)
class ChunkFile:
    name: str
    chunks: tuple[Chunk, ...]

    @property
    def size(self) -> int:
        return aligned(self.chunks[-1].start + self.chunks[-1].length)


def aligned(offset: int) -> int:
    return offset + -offset % ALIGNMENT


def train_layout(hf_config: Any, tp: int, pp: int, vpp: int, ep: int, etp: int) -> TrainLayout:
    """On as few ranks as hold it. ValueError for sizes that do not fit the model."""
    text = language_config(hf_config)
    layers, experts = text.num_hidden_layers, getattr(text, "num_experts", 0)
    if layers % (pp * vpp):
        raise ValueError(f"--pp {pp} --vpp {vpp}: {pp * vpp} chunks cannot hold {layers} layers evenly; choose sizes "
                         "whose product divides them")  # fmt: skip
    if ep > 1 and (not experts or experts % ep):
        raise ValueError(f"--ep {ep}: does not divide the model's {experts} experts; choose a divisor")
    return TrainLayout(ranks=pp * math.lcm(tp, ep * etp), tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp)


def chunk_files(
    hf_config: Any, layout: TrainLayout, dtype_of: Callable[[Parameter], torch.dtype]
) -> tuple[ChunkFile, ...]:
    """The files of a checkpoint that the ranks of `layout` would write, by rank.

    Raises ValueError if tensors that are one in the checkpoint differ in type.
    """
    by_rank: dict[int, list[Chunk]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for rank, chunk in _chunks(hf_config, layout, dtype_of):
        key = chunk.slot.keys[0]
        if dtypes.setdefault(key, chunk.dtype) is not chunk.dtype:
            raise ValueError(f"{key}: {dtypes[key]} in one layer and {chunk.dtype} in another, but one tensor in "
                             "Megatron; give --dtype")  # fmt: skip
        by_rank.setdefault(rank, []).append(chunk)
    return tuple(file for rank in sorted(by_rank) for file in _split(rank, by_rank[rank]))


def padded_vocabulary(vocabulary: int, tp: int) -> int:
    """Rows of Megatron's embedding; another number of them loads, too."""
    return vocabulary + -vocabulary % tp


def are_layers_stacked(hf_config: Any) -> bool:
    """Megatron stacks layers that are declared alike; those of a mixture of experts are declared one by one."""
    return not any(parameter.experts for parameter in parameters(hf_config))


def _chunks(
    hf_config: Any, layout: TrainLayout, dtype_of: Callable[[Parameter], torch.dtype]
) -> Iterator[tuple[int, Chunk]]:
    """(rank, chunk that starts at 0) in the order of export."""
    text, stacked = language_config(hf_config), are_layers_stacked(hf_config)
    layers = text.num_hidden_layers
    for parameter in parameters(hf_config, padded_vocabulary(text.vocab_size, layout.tp)):
        if parameter.row.twin:
            continue
        parts, dtype, shape = layout.parts(parameter), dtype_of(parameter), parameter.layout.full_shape
        for expert in range(max(parameter.experts, 1)):
            where = slot(parameter, expert, layers, stacked)
            ranks = holders(layout, parameter, expert if parameter.experts else -1, layers)
            for part in range(parts):
                for piece in pieces(parameter.layout, part, parts, dtype.itemsize):
                    sizes, offsets = _block(shape, piece)
                    sizes, offsets = (1,) * len(where.lead) + sizes, where.lead + offsets
                    yield ranks[part][0], Chunk(parameter, expert, piece, where, sizes, offsets, dtype, 0)


def _block(shape: Shape, piece: Piece) -> tuple[Shape, Shape]:
    """Sizes and offsets of a piece in the parameter's own dimensions."""
    (row, column), (rows, columns) = piece.place, piece.extent
    if columns == matrix(shape)[1]:
        return (rows, *shape[1:]), (row, *(0 for _ in shape[1:]))
    return (rows, columns), (row, column)


@cache
def pieces(layout: Layout, part: int, parts: int, itemsize: int) -> tuple[Piece, ...]:
    """What a part is made of; the last one with the padding that follows the parameter's last row."""
    whole = layout.mcore(0, 1)
    found = [
        Piece(box.tensor, (box.source[0] + inner.at[0], box.source[1] + inner.at[1]), inner.source, inner.shape)
        for box in layout.mcore(part, parts).boxes
        for inner in between(Shard(box.shape, (Box(box.tensor, box.source, (0, 0), box.shape),)), (whole,)).boxes
    ]
    filled = max(box.at[0] + box.shape[0] for box in whole.boxes)
    rows, columns = matrix(whole.shape)
    if part == parts - 1 and filled < rows:
        found.append(Piece(-1, (0, 0), (filled, 0), (rows - filled, columns)))
    return tuple(small for piece in found for small in _small(piece, itemsize))


def _small(piece: Piece, itemsize: int) -> Iterator[Piece]:
    """The piece by rows, none beyond the size of a record."""
    rows, columns = piece.extent
    step = max(1, LARGEST // (columns * itemsize))
    for first in range(0, rows, step):
        source, place = (piece.source[0] + first, piece.source[1]), (piece.place[0] + first, piece.place[1])
        yield Piece(piece.tensor, source, place, (min(step, rows - first), columns))


def _split(rank: int, chunks: list[Chunk]) -> Iterator[ChunkFile]:
    """One after the other in files of at most LARGEST_FILE."""
    placed: list[Chunk] = []
    number = start = 0
    for chunk in chunks:
        if placed and start + chunk.length > LARGEST_FILE:
            yield ChunkFile(f"__{rank}_{number}.distcp", tuple(placed))
            placed, number, start = [], number + 1, 0
        placed.append(replace(chunk, start=start))
        start = aligned(start + chunk.length)
    yield ChunkFile(f"__{rank}_{number}.distcp", tuple(placed))
