"""A signal that asks for the end of a run goes on to the ranks, which end after the step they are in.

Only ranks that listen get it: to any other process it would be the end at once. Standard library only.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

PASSED_ON = signal.SIGUSR1  # SIGTERM is what the agent ends ranks with when another one has failed

HANDLED = signal.SIGTERM, signal.SIGUSR1


class Notice:
    """A handler of SIGTERM and SIGUSR1."""

    def __init__(self, end_at_once: Callable[[signal.Signals], Exception]) -> None:
        """`end_at_once` makes the exception that is raised when no rank listens, and at a second SIGTERM."""
        self._end_at_once = end_at_once
        self.received: signal.Signals | None = None

    def listen(self) -> None:
        for number in HANDLED:
            signal.signal(number, self._receive)

    def _ignore(self) -> None:
        for number in HANDLED:
            signal.signal(number, signal.SIG_IGN)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        ranks = listeners(os.getpid())
        if not ranks or number == self.received == signal.SIGTERM:
            self._ignore()  # the agent must not be interrupted while it ends the ranks
            raise self._end_at_once(signal.Signals(number))
        self.received = signal.Signals(number)
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, PASSED_ON)


def listeners(parent: int) -> list[int]:
    """The children of a process that have a handler for what is passed on."""
    found: list[int] = []
    for file in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):  # it has ended
            status = dict(line.split(":", 1) for line in file.read_text().splitlines())
            if int(status["PPid"]) == parent and int(status["SigCgt"], 16) >> (PASSED_ON - 1) & 1:
                found.append(int(file.parent.name))
    return found
