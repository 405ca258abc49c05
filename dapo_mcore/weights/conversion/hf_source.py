"""A folder of Hugging Face weights, read parameter by parameter."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dapo_mcore.weights.boxes import Shape
from dapo_mcore.weights.conversion.mapped import MappedFile
from dapo_mcore.weights.hf_folder import HFFolder, check_folder, weight_files
from dapo_mcore.weights.names import Parameter, expert_names

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class _Place:
    file: MappedFile
    start: int
    dtype: torch.dtype
    shape: Shape


class HFSource:
    """Raises ValueError when the folder does not hold exactly the tensors of `hf_config`, listing all differences."""

    def __init__(self, path: Path, hf_config: Any) -> None:
        self.path = path
        self._headers = HFFolder(path)
        check_folder(self._headers, hf_config)
        self.files = {file: MappedFile(file) for file in weight_files(path)}
        self._places = {name: place for file in self.files.items() for name, place in _places(*file)}

    def dtype(self, parameter: Parameter) -> torch.dtype:
        """ValueError if the tensors that make up the parameter do not share one."""
        names = parameter.hf_shapes(self._headers.form_of(parameter))
        found = {self._places[name].dtype for name in names}
        if len(found) > 1:
            types = ", ".join(sorted(map(str, found)))
            raise ValueError(f"{self.path}: {next(iter(names))} is one tensor with others in Megatron, but they have "
                             f"several types ({types}); give --dtype")  # fmt: skip
        return found.pop()

    def hf_tensors(self, parameter: Parameter, expert: int) -> tuple[Tensor, ...]:
        """The Hugging Face tensors of a parameter, or of one of its experts: views of the mapped files."""
        form = self._headers.form_of(parameter)
        if form.stacked:
            matrix = self._tensor(form.names[0])[expert]
            return parameter.layout.to_hf(matrix.mT if form.transposed else matrix)
        return tuple(self._tensor(name) for name in expert_names(form, expert))

    def drop(self) -> None:
        for file in self.files.values():
            file.drop()

    def _tensor(self, name: str) -> Tensor:
        place = self._places[name]
        return place.file.tensor(place.start, place.dtype, place.shape)


def _places(path: Path, file: MappedFile) -> list[tuple[str, _Place]]:
    """Of the floating point tensors of a safetensors file: 8 bytes length of the header, header, tensors."""
    length = int.from_bytes(file.bytes(0, 8), "little")
    header = json.loads(bytes(file.bytes(8, length)))
    return [
        (name, _Place(file, 8 + length + entry["data_offsets"][0], DTYPES[entry["dtype"]], tuple(entry["shape"])))
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] in DTYPES
    ]
