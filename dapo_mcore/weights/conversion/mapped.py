"""Files as memory of which little is resident."""

from __future__ import annotations

import mmap
import os
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from dapo_mcore.weights.boxes import Shape


class MappedFile:
    """A file's tensors as views: bytes are read when they are used, and can be dropped from memory again."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            # Private, because torch wants writable memory; nothing is written to it.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if self.size else b""

    def bytes(self, start: int, length: int) -> memoryview:
        return memoryview(self._map)[start : start + length]

    def tensor(self, start: int, dtype: torch.dtype, shape: Shape) -> Tensor:
        """[shape], contiguous, whose first element is at byte `start`; not to be written to."""
        return self.elements(start, dtype, prod(shape)).view(shape)

    def elements(self, start: int, dtype: torch.dtype, count: int) -> Tensor:
        """[count]"""
        if not count:
            return torch.empty(0, dtype=dtype)
        if start % dtype.itemsize:  # some writers align nothing
            raw = torch.frombuffer(self._map, dtype=torch.uint8, count=count * dtype.itemsize, offset=start)
            return raw.clone().view(dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start)

    def drop(self) -> None:
        """Give the pages read so far back to the system; views stay valid, and read them again from the file."""
        if self.size:
            self._map.madvise(mmap.MADV_DONTNEED)  # pyright: ignore[reportAttributeAccessIssue]
