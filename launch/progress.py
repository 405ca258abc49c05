"""A live line per stage on a terminal, plain lines elsewhere; and child processes that report through their log.

Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

BAR_WIDTH = 24
POLL_S = 0.3
QUIET_S = 20.0  # without a terminal, a stage speaks at least this often
ONCE_S = 1.0  # for what ends when it is asked once
GRACE_S = 40.0  # torchrun gives its own workers 30 s to end


class StageFailed(Exception):
    """A child ended with an error; `str()` is what the user needs to read."""


@dataclass
class Stage:
    """One line of the display. `update` says how far it is; `close` leaves the final line."""

    label: str
    out: TextIO = field(default_factory=lambda: sys.stdout)
    clock: Callable[[], float] = time.monotonic
    done: int = 0
    total: int = 0  # 0: unknown
    note: str = ""

    def __post_init__(self) -> None:
        self._start = self.clock()
        self._live = self.out.isatty()
        self._spoke_at, self._spoke_tenth = self._start, -1
        if not self._live:
            self._print(f"{self.label} ...")

    @property
    def seconds(self) -> float:
        return self.clock() - self._start

    def update(self, done: int | None = None, total: int | None = None, note: str | None = None) -> None:
        self.done = self.done if done is None else done
        self.total = self.total if total is None else total
        self.note = self.note if note is None else note
        if self._live:
            self._redraw()
        elif self._has_news():
            self._print(self._line())

    def close(self, note: str) -> None:
        self.note = note
        if self._live:
            self.out.write("\r\x1b[K")
        self._print(f"{self.label:<12} {note}  ({self.seconds:.0f} s)")

    def _has_news(self) -> bool:
        tenth = 10 * self.done // self.total if self.total else -1
        if tenth == self._spoke_tenth and self.clock() - self._spoke_at < QUIET_S:
            return False
        self._spoke_tenth, self._spoke_at = tenth, self.clock()
        return True

    def _line(self) -> str:
        parts = [f"{self.label:<12}"]
        if self.total:
            filled = BAR_WIDTH * min(self.done, self.total) // self.total
            parts.append("█" * filled + "░" * (BAR_WIDTH - filled))
        return " ".join([*parts, f"{self.seconds:4.0f} s ", self.note])

    def _redraw(self) -> None:
        width = shutil.get_terminal_size().columns - 1
        self.out.write("\r\x1b[K" + self._line()[:width])
        self.out.flush()

    def _print(self, line: str) -> None:
        self.out.write(line + "\n")
        self.out.flush()


def run(
    command: Sequence[str],
    *,
    log: Path,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] = lambda line: None,
    on_tick: Callable[[], None] = lambda: None,
) -> None:
    """Runs `command` with its output appended to `log`; hands every complete line to `on_line`, and ticks meanwhile.

    StageFailed with the log's end when it fails. Whatever ends this call early also ends the command's process group.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as sink, log.open("r", errors="replace") as source:
        source.seek(0, os.SEEK_END)
        sink.write(f"$ {' '.join(command)}\n".encode())
        sink.flush()
        child = subprocess.Popen(
            command, cwd=cwd, env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL, stdout=sink,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            _follow(child, source, on_line, on_tick)
        finally:
            _end(child)
    if child.returncode:
        raise StageFailed(failure(command, child.returncode, log))


def failure(command: Sequence[str], code: int, log: Path, lines: int = 25) -> str:
    tail = log.read_text(errors="replace").splitlines()[-lines:]
    return "\n".join(["", *(f"  | {line}" for line in tail), "", f"failed with exit code {code}: {' '.join(command)}",
                      f"the whole output is in {log}"])  # fmt: skip


def _follow(
    child: subprocess.Popen[bytes], source: TextIO, on_line: Callable[[str], None], on_tick: Callable[[], None]
) -> None:
    pending = ""
    running = True
    while running:
        try:
            child.wait(POLL_S)
            running = False
        except subprocess.TimeoutExpired:
            pass
        *complete, pending = (pending + source.read()).split("\n")
        for line in complete:
            on_line(line)
        on_tick()


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends the process group the child leads, if it still runs. Politely first: torchrun has workers to end.

    Asked once, a run would go on to the end of its step.
    """
    if child.poll() is not None:
        return
    deaf = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        for request, patience_s in ((signal.SIGTERM, ONCE_S), (signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
            os.killpg(child.pid, request)
            try:
                child.wait(patience_s)
                return
            except subprocess.TimeoutExpired:
                continue
    finally:
        for number, handler in deaf.items():
            signal.signal(number, handler)
