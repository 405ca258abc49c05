"""Messages between the pool and its workers: four bytes of length, then that many bytes."""

from __future__ import annotations

import socket

HEADER_BYTES = 4


def frame(payload: bytes) -> bytes:
    return len(payload).to_bytes(HEADER_BYTES, "big") + payload


def receive(channel: socket.socket) -> bytes | None:
    """The next payload; None once the other side is gone. Blocks."""
    header = _exactly(channel, HEADER_BYTES)
    return header and _exactly(channel, int.from_bytes(header, "big"))


def _exactly(channel: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        part = channel.recv(size - len(data))
        if not part:
            return None
        data += part
    return bytes(data)
