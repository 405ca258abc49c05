"""One tensor as `torch.save` writes it: a zip archive whose largest entry is the storage, byte for byte.

Megatron's distributed checkpoints are files of such archives one after the other. Knowing where the storage lies lets
a converter write tensors in slices and read them through a mapping, without a copy of the whole in memory.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch._utils

from dapo_mcore.weights.boxes import Shape

ALIGNMENT = 64  # of storages, as torch aligns them
LARGEST = 1 << 29  # bytes of a record's storage; beyond 4 GiB the archive would need zip64
_STORAGE = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
}
_DTYPE = {name: dtype for dtype, name in _STORAGE.items()}


class NotATensor(ValueError):
    """A record holds something else than one plain tensor."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What surrounds a storage in its record."""

    head: bytes
    tail: bytes


@lru_cache(maxsize=256)
def frame(shape: Shape, dtype: torch.dtype) -> Frame:
    """Of a contiguous tensor of at most LARGEST bytes."""
    count = torch.Size(shape).numel()
    entries = (
        ("archive/data.pkl", _pickled(shape, dtype, count)),
        ("archive/byteorder", sys.byteorder.encode()),
        ("archive/version", b"3\n"),
    )
    head, directory = b"", b""
    for name, content in entries:
        entry = _entry(name, len(content), zlib.crc32(content), len(head))
        directory += entry.central
        head += entry.local + content
    # torch.load checks no CRC, and none of torch's own can be had without reading the storage twice
    storage = _entry("archive/data/0", count * dtype.itemsize, 0, len(head), aligned=True)
    directory += storage.central
    head += storage.local
    at = len(head) + count * dtype.itemsize
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(entries) + 1, len(entries) + 1, len(directory), at, 0)
    return Frame(head, directory + end)


@dataclass(frozen=True, slots=True)
class _Entry:
    local: bytes
    central: bytes


def _entry(name: str, size: int, crc: int, offset: int, aligned: bool = False) -> _Entry:
    """Headers of a stored (not compressed) zip entry that begins at `offset`."""
    encoded = name.encode()
    extra = b""
    if aligned:
        start = offset + 30 + len(encoded) + 4
        padding = -start % ALIGNMENT
        extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    shared = struct.pack("<5H3L2H", 20, 0, 0, 0, 0, crc, size, size, len(encoded), len(extra))
    local = b"PK\3\4" + shared + encoded + extra
    shared = struct.pack("<5H3L2H", 20, 0, 0, 0, 0, crc, size, size, len(encoded), 0)
    central = b"PK\1\2" + struct.pack("<H", 20) + shared + struct.pack("<3H2L", 0, 0, 0, 0, offset) + encoded
    return _Entry(local, central)


class _Storage:
    """Stands for the storage while a tensor is pickled without one."""


class _Tensor:
    """Pickled as torch pickles a contiguous tensor."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        stride, step = [], 1
        for length in reversed(self.shape):
            stride.insert(0, step)
            step *= max(length, 1)
        arguments = (_Storage(), 0, self.shape, tuple(stride), False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


def _pickled(shape: Shape, dtype: torch.dtype, count: int) -> bytes:
    if dtype not in _STORAGE:
        raise ValueError(f"{dtype}: weights are floating point; convert them to one of {', '.join(map(str, _STORAGE))}")
    reference = ("storage", getattr(torch, _STORAGE[dtype]), "0", "cpu", count)
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, protocol=2)
    pickler.reference = reference
    pickler.dump(_Tensor(shape))
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    reference: tuple[Any, ...]

    def persistent_id(self, obj: Any) -> Any:
        return self.reference if isinstance(obj, _Storage) else None


@dataclass(frozen=True, slots=True)
class Strided:
    """Where a tensor's elements lie in its record; `start` counts bytes, `stride` elements."""

    start: int
    dtype: torch.dtype
    shape: Shape
    stride: Shape

    @property
    def span(self) -> int:
        """Elements from the first to the last."""
        return 1 + sum((length - 1) * step for length, step in zip(self.shape, self.stride, strict=True))


def locate(record: memoryview) -> Strided:
    """The tensor of a record that torch, Megatron or `frame` wrote; nothing of it is executed.

    Raises NotATensor for anything else.
    """
    try:
        archive = zipfile.ZipFile(_View(record))
        names = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        unpickler = _Unpickler(io.BytesIO(archive.read(names["data.pkl"])))
        (kind, key, *_), offset, shape, stride, *_ = unpickler.load()
        header = names[f"data/{key}"].header_offset
        name_length, extra_length = struct.unpack("<2H", record[header + 26 : header + 30])
        start = header + 30 + name_length + extra_length + offset * _DTYPE[kind].itemsize
        return Strided(start, _DTYPE[kind], tuple(shape), tuple(stride))
    except (zipfile.BadZipFile, pickle.UnpicklingError, KeyError, ValueError, TypeError, struct.error) as error:
        raise NotATensor(f"not one tensor as torch.save writes it ({error})") from error


class _View(io.RawIOBase):
    """A read-only file over memory that is not copied."""

    def __init__(self, memory: memoryview) -> None:
        self.memory, self.place = memory, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.place = offset + (0, self.place, len(self.memory))[whence]
        return self.place

    def readinto(self, buffer: Any) -> int:
        part = self.memory[self.place : self.place + len(buffer)]
        buffer[: len(part)] = part
        self.place += len(part)
        return len(part)


class _Unpickler(pickle.Unpickler):
    """Yields the arguments of the one call that rebuilds a tensor; knows nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *arguments: arguments
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _DTYPE:
            return name
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return pid[1:]
