"""The index of a distributed checkpoint (format torch_dist), written and read without a process group."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dapo_mcore.weights.conversion.plan import ChunkFile

INDEX = ".metadata"
STATES = "states.distcp"
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# What an index may refer to; anything else could run code.
_KNOWN = {
    "builtins": {"list", "dict", "tuple", "set", "slice", "int", "str"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},
    "torch": {"Size", "device", "strided", "float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8",
              "bool", "int8", "int16", "float8_e4m3fn", "float8_e5m2", "layout", "dtype"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member_of
        if name in _KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _member_of(enumeration: type[Enum], name: str) -> Enum:
    """What getattr is for in an index: Python up to 3.11.3 pickles members of enumerations by it."""
    if isinstance(enumeration, type) and issubclass(enumeration, Enum):
        return enumeration[name]
    raise pickle.UnpicklingError("it refers to builtins.getattr")


def read_index(folder: Path) -> Metadata:
    """Raises ValueError, naming the file, if it is missing or is no index."""
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(f"{folder}: no {INDEX}, so it is no distributed checkpoint; give the folder that holds "
                         f"{INDEX} and *.distcp")  # fmt: skip
    try:
        return cast(Metadata, _Unpickler(io.BytesIO(path.read_bytes())).load())
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not the index of a distributed checkpoint ({error}); copy it again") from error


def write_index(folder: Path, files: Iterable[ChunkFile]) -> None:
    """Everything of a checkpoint but its tensors.

    A parameter is listed under each of its keys, which costs no bytes: the layers of Transformer Engine and the local
    ones do not agree on all of them. For the same reason every module that may ask for a state finds an empty one.
    """
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    state = _StorageInfo(STATES, 0, _write_empty_state(folder / STATES))
    for file in files:
        for chunk in file.chunks:
            offsets, sizes = torch.Size(chunk.offsets), torch.Size(chunk.sizes)
            for key in chunk.slot.keys:
                size = torch.Size((*chunk.slot.extent, *chunk.parameter.layout.full_shape))
                entry = entries.setdefault(key, TensorStorageMetadata(TensorProperties(dtype=chunk.dtype), size, []))
                assert isinstance(entry, TensorStorageMetadata)  # states have other keys
                entry.chunks.append(ChunkStorageMetadata(offsets, sizes))
                storage[MetadataIndex(key, offsets)] = _StorageInfo(file.name, chunk.start, chunk.length)
            for key in chunk.slot.state_keys:
                entries[key] = BytesStorageMetadata()
                storage[MetadataIndex(key)] = state
    (folder / INDEX).write_bytes(pickle.dumps(Metadata(entries, storage_data=storage)))
    (folder / "metadata.json").write_text(json.dumps(BACKEND))
    torch.save({}, folder / "common.pt")


def _write_empty_state(path: Path) -> int:
    """A file with what Megatron saves for a module that has nothing to say; its size."""
    torch.save([None], path)
    return path.stat().st_size
