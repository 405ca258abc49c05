"""safetensors files whose contents are known, to the byte, before a tensor is read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dapo_mcore.weights.boxes import Shape
from dapo_mcore.weights.conversion.hf_source import DTYPES
from dapo_mcore.weights.hf_folder import INDEX, SINGLE
from dapo_mcore.weights.names import Parameter, expert_names

LARGEST_FILE = 2 << 30  # bytes
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Target:
    """A Hugging Face tensor and where it comes from."""

    name: str
    shape: Shape
    dtype: torch.dtype
    parameter: Parameter
    expert: int  # -1: the tensor holds all of them
    position: int  # among the tensors of the parameter, or of its expert

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class TensorFile:
    name: str
    targets: tuple[Target, ...]

    @property
    def header(self) -> bytes:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for target in self.targets:
            stop = start + target.nbytes
            entries[target.name] = {
                "dtype": _NAMES[target.dtype],
                "shape": list(target.shape),
                "data_offsets": [start, stop],
            }
            start = stop
        encoded = json.dumps(entries, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        return len(encoded).to_bytes(8, "little") + encoded

    @property
    def size(self) -> int:
        return len(self.header) + sum(target.nbytes for target in self.targets)


def targets(parameter: Parameter, dtype: torch.dtype) -> Iterator[Target]:
    form = parameter.hf_forms[0]
    if form.stacked:
        ((name, shape),) = parameter.hf_shapes(form).items()
        yield Target(name, shape, dtype, parameter, -1, 0)
        return
    for expert in range(max(parameter.experts, 1)):
        for position, name in enumerate(expert_names(form, expert)):
            yield Target(name, parameter.layout.hf_shapes[position], dtype, parameter, expert, position)


def tensor_files(wanted: list[Target]) -> tuple[TensorFile, ...]:
    """In files of at most LARGEST_FILE, under the names that transformers gives them."""
    groups: list[list[Target]] = [[]]
    size = 0
    for target in wanted:
        if groups[-1] and size + target.nbytes > LARGEST_FILE:
            groups.append([])
            size = 0
        groups[-1].append(target)
        size += target.nbytes
    if len(groups) == 1:
        return (TensorFile(SINGLE, tuple(groups[0])),)
    return tuple(
        TensorFile(f"model-{number:05}-of-{len(groups):05}.safetensors", tuple(group))
        for number, group in enumerate(groups, 1)
    )


def index_of(files: tuple[TensorFile, ...]) -> dict[str, str]:
    """Name -> text of the index of several files; nothing for one."""
    if len(files) == 1:
        return {}
    total = sum(target.nbytes for file in files for target in file.targets)
    weight_map = {target.name: file.name for file in files for target in file.targets}
    return {INDEX: json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)}
