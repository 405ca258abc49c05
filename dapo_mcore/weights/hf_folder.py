"""A folder of safetensors files as a mapping from names to tensors, and the strict check against a family."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dapo_mcore.weights.boxes import Shape
from dapo_mcore.weights.names import Parameter, expert_names, parameters
from dapo_mcore.weights.sections import Form

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32", "BF16", "F16", "F64"}  # of safetensors; anything else is a quantised model
IGNORED = ("rotary_emb.inv_freq",)  # ends of names of buffers that old files carry and configs determine
LISTED = 8  # names printed per kind of defect


class HFFolder:
    """Reads headers at once and tensors lazily, through mmap: what is not used of a tensor is not read from disk.

    Raises ValueError, naming the file, for a missing folder, index or shard, for a corrupt or truncated file, and for a
    name that lies in two files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self._files: dict[str, Any] = {}  # tensor name -> open file
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}  # in safetensors' spelling
        for path in weight_files(self.path):
            self._add(path)

    def _add(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path}: corrupt or truncated ({error}); download or copy the file again") from error
        for name in file.offset_keys():
            if name in self._files:
                raise ValueError(f"{path}: holds {name}, which another file of the folder holds, too; remove one")
            header = file.get_slice(name)
            self._files[name] = file
            self.shapes[name] = tuple(header.get_shape())
            self.dtypes[name] = header.get_dtype()

    def tensor(self, name: str) -> Tensor:
        """On the CPU, in the file's dtype; a view of the mapped file, not to be written to."""
        return self._files[name].get_tensor(name)

    def form_of(self, parameter: Parameter) -> Form:
        """In which of its forms a parameter lies here; the first one if in none."""
        forms = parameter.hf_forms
        present = (form for form in forms if expert_names(form, 0)[0] in self.shapes)
        return next(present, forms[0])

    def mcore_tensor(self, parameter: Parameter, expert: int = 0) -> Tensor:
        """The whole Megatron parameter, or one expert of it, before it is cut over ranks."""
        form = self.form_of(parameter)
        if form.stacked:
            matrix = self.tensor(form.names[0])[expert]
            return matrix.mT if form.transposed else matrix
        return parameter.layout.to_mcore([self.tensor(name) for name in expert_names(form, expert)])


def weight_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the folder that holds config.json and {SINGLE}")
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        found = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))[:LISTED]) or "no safetensors file"
        raise ValueError(f"{folder}: neither {SINGLE} nor {INDEX} (found: {found}); download the model completely, "
                         "or convert it to safetensors")  # fmt: skip
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not a safetensors index ({error}); download it again") from error
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{folder}: {INDEX} names {', '.join(absent)}, which is missing; download the rest")
    return [folder / name for name in names]


def check_folder(folder: HFFolder, hf_config: Any) -> None:
    """Raises one ValueError that lists every tensor which is missing, unexpected, of the wrong shape or no float."""
    wanted, twins = _wanted(folder, hf_config)
    ignored = {name for name in folder.shapes if name.endswith(IGNORED)}
    ignored |= {twin for twin, original in twins.items() if _equal(folder, twin, original)}
    present = folder.shapes.keys() - ignored
    defects = listed("missing", wanted.keys() - present)
    defects += listed("unexpected", present - wanted.keys())
    shared = sorted(wanted.keys() & present)
    wrong = [f"{n} {list(folder.shapes[n])}, not {list(wanted[n])}" for n in shared if folder.shapes[n] != wanted[n]]
    defects += listed("wrong shape", wrong)
    defects += listed("not floating point", [f"{n} {t}" for n in shared if (t := folder.dtypes[n]) not in DTYPES])
    if defects:
        raise ValueError(f"{folder.path}: its weights do not fit its config.json (model_type={hf_config.model_type})\n"
                         + "\n".join(defects))  # fmt: skip


def _wanted(folder: HFFolder, hf_config: Any) -> tuple[dict[str, Shape], dict[str, str]]:
    """Shapes by name, in the forms met here; and names that may repeat another tensor: {repetition: original}."""
    shapes: dict[str, Shape] = {}
    twins: dict[str, str] = {}
    for parameter in parameters(hf_config):
        form = folder.form_of(parameter)
        if parameter.row.twin:
            twins[parameter.row.twin] = form.names[0]
        shapes |= parameter.hf_shapes(form)
    return shapes, twins


def _equal(folder: HFFolder, twin: str, original: str) -> bool:
    if not {twin, original} <= folder.shapes.keys():
        return False
    return torch.equal(folder.tensor(twin), folder.tensor(original))


def listed(kind: str, names: Iterable[str]) -> list[str]:
    ordered = sorted(names)
    if not ordered:
        return []
    more = f", and {len(ordered) - LISTED} more" if len(ordered) > LISTED else ""
    return [f"  {kind} ({len(ordered)}): {', '.join(ordered[:LISTED])}{more}"]
