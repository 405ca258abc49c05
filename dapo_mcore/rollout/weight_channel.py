"""Weights on their way from the trainer to engines in other processes.

Every push is one broadcast over a gloo process group of its own, which ends with it: whoever has died or been replaced
since the last push is simply not invited to the next.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroupGloo

BUCKET_BYTES = 64 << 20  # of weights in one broadcast; a larger tensor has one of its own
ALIGNMENT = 16  # bytes; a tensor in a bucket starts where any dtype may


@dataclass(frozen=True, slots=True)
class Entry:
    name: str  # of Hugging Face
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Meeting:
    """What a receiver must know of a push."""

    host: str  # of the sender
    port: int
    size: int  # the sender, rank 0, and its receivers
    entries: tuple[Entry, ...]  # in the order they are sent
    timeout_s: float  # of the meeting, and of each broadcast


class Sender:
    """Rank 0 of one push."""

    def __init__(self, weights: Sequence[tuple[str, Tensor]], *, receivers: int, host: str, timeout_s: float) -> None:
        """Listen for `receivers` on the address `host` of this machine. `weights`: HF name and full CPU tensor."""
        self._tensors = [tensor for _, tensor in weights]
        entries = tuple(Entry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in weights)
        listener = socket.create_server((host, 0))  # a TCPStore that is given none listens on every interface
        port = listener.getsockname()[1]
        self.meeting = Meeting(host, port, receivers + 1, entries, timeout_s)
        self._store = dist.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),
        )

    def send(self) -> None:
        """Meet the receivers and send them everything.

        Raises:
            RuntimeError: one of them did not come or went away, or the time was up.
        """
        group = _join(self._store, self.meeting, 0, self.meeting.host)
        entries = self.meeting.entries
        for bucket, num_bytes in _buckets(entries):
            flat = torch.empty(num_bytes, dtype=torch.uint8)
            for index, start in bucket:
                _view(flat, start, entries[index]).copy_(self._tensors[index])
            _broadcast(group, flat)


def receive(meeting: Meeting, rank: int, host: str) -> Iterator[tuple[str, Tensor]]:
    """HF name and full CPU tensor of every weight, while they arrive; each tensor stays as it is.

    Args:
        meeting: as the sender has made it.
        rank: of this receiver, from 1.
        host: address of this machine to be reached at.

    Raises:
        RuntimeError: the sender or another receiver went away, or the time was up.
    """
    store = dist.TCPStore(meeting.host, meeting.port, is_master=False, timeout=timedelta(seconds=meeting.timeout_s))
    group = _join(store, meeting, rank, host)
    for bucket, num_bytes in _buckets(meeting.entries):
        flat = torch.empty(num_bytes, dtype=torch.uint8)
        _broadcast(group, flat)
        for index, start in bucket:
            entry = meeting.entries[index]
            yield entry.name, _view(flat, start, entry)


Bucket = list[tuple[int, int]]  # (position among the entries, first byte)


def _buckets(entries: Sequence[Entry]) -> Iterator[tuple[Bucket, int]]:
    """The entries in order, so many at a time as BUCKET_BYTES hold, and the bytes they take; alike on every rank."""
    bucket: Bucket = []
    used = 0
    for index, entry in enumerate(entries):
        if bucket and used + entry.num_bytes > BUCKET_BYTES:
            yield bucket, used
            bucket, used = [], 0
        bucket.append((index, used))
        used += -(-entry.num_bytes // ALIGNMENT) * ALIGNMENT
    if bucket:
        yield bucket, used


def _view(flat: Tensor, start: int, entry: Entry) -> Tensor:
    """The tensor that lies in these bytes."""
    return flat[start : start + entry.num_bytes].view(entry.dtype).view(entry.shape)


def _join(store: dist.Store, meeting: Meeting, rank: int, host: str) -> Any:
    gloo: Any = ProcessGroupGloo  # torch's stub knows neither its options nor its methods
    options = gloo._Options()
    options._timeout = timedelta(seconds=meeting.timeout_s)
    options._devices = [gloo.create_device(hostname=host)]
    return gloo(store, rank, meeting.size, options)


def _broadcast(group: Any, flat: Tensor) -> None:
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    group.broadcast([flat], options).wait()
