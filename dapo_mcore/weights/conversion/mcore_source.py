"""A distributed checkpoint of Megatron, read parameter by parameter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from dapo_mcore.weights.boxes import Shape
from dapo_mcore.weights.conversion.mapped import MappedFile
from dapo_mcore.weights.conversion.slots import Slot, slot
from dapo_mcore.weights.conversion.torch_dist import read_index
from dapo_mcore.weights.conversion.torch_record import NotATensor, locate
from dapo_mcore.weights.families import language_config
from dapo_mcore.weights.hf_folder import listed
from dapo_mcore.weights.names import Parameter, parameters

# What training keeps beside the weights.
BESIDE = ("optimizer.", "rng_state", "rerun_state_machine_state")


@dataclass(frozen=True, slots=True)
class Stored:
    """A rectangle of a tensor, and the record that holds it."""

    offsets: Shape
    sizes: Shape
    file: str
    start: int
    length: int

    def region(self, axes: int) -> tuple[slice, ...]:
        """The rectangle, without its first `axes` axes."""
        spans = zip(self.offsets[axes:], self.sizes[axes:], strict=True)
        return tuple(slice(at, at + length) for at, length in spans)


Chunks: TypeAlias = dict[Shape, list[Stored]]  # by the index along the leading axes


class McoreSource:
    """Raises ValueError, listing all differences, when the checkpoint does not hold exactly the weights of `hf_config`.

    The number of ranks, the layout and the padding of the vocabulary under which it was written do not matter, nor do
    optimizer states beside the weights.
    """

    def __init__(self, path: Path, hf_config: Any) -> None:
        self.path = path
        self._index = read_index(path)
        self._tensors = weights_of(self._index)
        self._layers = language_config(hf_config).num_hidden_layers
        self._stacked = not any(".layers.0." in key for key in self._tensors)
        self._chunks: dict[str, Chunks] = {}
        self._axes: dict[str, int] = {}  # key -> number of leading axes
        self.parameters = self._declared(hf_config)
        self._check(hf_config)
        self.files: dict[str, MappedFile] = {}
        for key in self._tensors:
            for stored in chunks_of(self._index, key):
                self.files.setdefault(stored.file, MappedFile(path / stored.file))

    def dtype(self, parameter: Parameter) -> torch.dtype:
        return self._tensors[self._key(self._slot(parameter, 0))].properties.dtype

    def hf_tensors(self, parameter: Parameter, expert: int) -> tuple[Tensor, ...]:
        """The Hugging Face tensors of a parameter, or of one of its experts: views of mapped files where possible."""
        return parameter.layout.to_hf(self._whole(parameter, expert))

    def drop(self) -> None:
        for file in self.files.values():
            file.drop()

    def _declared(self, hf_config: Any) -> list[Parameter]:
        """With the vocabulary padded as it is here."""
        first = next(parameters(hf_config))
        embedding = self._tensors.get(self._key(self._slot(first, 0)))
        rows = max(embedding.size[0], language_config(hf_config).vocab_size) if embedding else None
        return [parameter for parameter in parameters(hf_config, rows) if not parameter.row.twin]

    def _slot(self, parameter: Parameter, expert: int) -> Slot:
        return slot(parameter, expert, self._layers, self._stacked)

    def _key(self, where: Slot) -> str:
        """The key met here; the first one if none is."""
        return next((key for key in where.keys if key in self._tensors), where.keys[0])

    def _check(self, hf_config: Any) -> None:
        wanted: dict[str, Shape] = {}
        aliases: set[str] = set()
        for parameter in self.parameters:
            where = self._slot(parameter, 0)
            wanted[self._key(where)] = (*where.extent, *parameter.layout.full_shape)
            self._axes[self._key(where)] = len(where.lead)
            aliases.update(where.keys)
        found = {key: tuple(entry.size) for key, entry in self._tensors.items()}
        shared = sorted(wanted.keys() & found.keys())
        defects = listed("missing", wanted.keys() - found.keys())
        defects += listed("unexpected", found.keys() - aliases)
        wrong = [key for key in shared if found[key] != wanted[key]]
        defects += listed("wrong shape", [f"{key} {list(found[key])}, not {list(wanted[key])}" for key in wrong])
        defects += listed("incomplete", [key for key in shared if key not in wrong and not self._is_whole(key)])
        if defects:
            raise ValueError(
                f"{self.path}: its weights do not fit the config (model_type={hf_config.model_type})\n"
                + "\n".join(defects)
            )

    def _is_whole(self, key: str) -> bool:
        """Whether the chunks tile the tensor."""
        size, axes = tuple(self._tensors[key].size), self._axes[key]
        chunks = self._by_lead(key)
        everywhere = set(product(*(range(length) for length in size[:axes])))
        return chunks.keys() == everywhere and all(_tile(some, axes, size[axes:]) for some in chunks.values())

    def _whole(self, parameter: Parameter, expert: int) -> Tensor:
        """The Megatron parameter, or one expert of it, before it was cut."""
        where, shape = self._slot(parameter, expert), parameter.layout.full_shape
        chunks, axes = self._by_lead(self._key(where))[where.lead], len(where.lead)
        if len(chunks) == 1:
            return self._load(chunks[0], where.lead)
        whole = torch.empty(shape, dtype=self.dtype(parameter))
        for chunk in chunks:
            whole[chunk.region(axes)] = self._load(chunk, where.lead)
        return whole

    def _by_lead(self, key: str) -> Chunks:
        if key not in self._chunks:
            chunks: Chunks = {}
            for stored in chunks_of(self._index, key):
                for lead in product(*(range(part.start, part.stop) for part in stored.region(0)[: self._axes[key]])):
                    chunks.setdefault(lead, []).append(stored)
            self._chunks[key] = chunks
        return self._chunks[key]

    def _load(self, stored: Stored, lead: Shape) -> Tensor:
        """The chunk's part at `lead`, without the leading axes."""
        file = self.files[stored.file]
        try:
            found = locate(file.bytes(stored.start, stored.length))
        except NotATensor as error:
            raise ValueError(f"{self.path / stored.file}: the record at byte {stored.start} is {error}; the file is "
                             "damaged: copy it again") from error  # fmt: skip
        elements = file.elements(stored.start + found.start, found.dtype, found.span)
        tensor = elements.as_strided(found.shape, found.stride).view(stored.sizes)
        return tensor[tuple(index - at for index, at in zip(lead, stored.offsets, strict=False))]


def _tile(chunks: list[Stored], axes: int, shape: Shape) -> bool:
    """Whether chunks lie inside a tensor, have no element in common and leave none out."""
    regions = [chunk.region(axes) for chunk in chunks]
    inside = all(part.stop <= length for region in regions for part, length in zip(region, shape, strict=True))
    apart = all(
        any(a.stop <= b.start or b.stop <= a.start for a, b in zip(one, other, strict=True))
        for one, other in combinations(regions, 2)
    )
    return inside and apart and sum(math.prod(chunk.sizes[axes:]) for chunk in chunks) == math.prod(shape)


def weights_of(index: Metadata) -> dict[str, TensorStorageMetadata]:
    """The tensors of the model among all entries of a checkpoint."""
    return {
        key: entry
        for key, entry in index.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not key.startswith(BESIDE)
    }


def chunks_of(index: Metadata, key: str) -> Iterator[Stored]:
    entry = index.state_dict_metadata[key]
    assert isinstance(entry, TensorStorageMetadata)
    for chunk in entry.chunks:
        info = index.storage_data[MetadataIndex(key, chunk.offsets)]
        yield Stored(tuple(chunk.offsets), tuple(chunk.sizes), info.relative_path, info.offset, info.length)
