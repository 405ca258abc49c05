"""A grading process as the pool sees it."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

from dapo_mcore.reward.frames import HEADER_BYTES, frame

STARTUP_S = 120.0  # interpreter, sympy and a user's imports, on a machine that is busy
MAX_REPLY_BYTES = 1 << 16
LAST_WORDS_S = 1.0  # between a closed channel and the exit status


class WorkerDied(Exception):
    """The process is gone, or talks nonsense; says why."""


class WorkerProcess:
    """Starts at once, is ready later. Whoever holds it must `kill` it."""

    def __init__(self, verifier: str, timeout_s: float) -> None:
        self.verifier, self.timeout_s = verifier, timeout_s
        self.is_ready = False
        self.task: int | None = None  # index of the item that it grades
        self.deadline = monotonic() + STARTUP_S  # of the start or of the task; infinite while idle
        self._buffer = bytearray()
        self.channel, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "dapo_mcore.reward.worker"]
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), verifier, str(timeout_s)],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,  # the terminal's interrupt goes to the trainer, kill reaches grandchildren
            )

    @property
    def is_idle(self) -> bool:
        return self.is_ready and self.task is None

    def assign(self, task: int, response: str, answer: str, metadata: Mapping[str, Any]) -> None:
        """Grade one item until `timeout_s` from now.

        Raises:
            WorkerDied: the process is gone.
            TimeoutError: it does not read.
        """
        self.task, self.deadline = task, monotonic() + self.timeout_s
        self.channel.settimeout(self.timeout_s)
        try:
            self.channel.sendall(frame(pickle.dumps((response, answer, dict(metadata)))))
        except ConnectionError:
            raise WorkerDied(self._exit_reason()) from None

    def read(self) -> dict[str, Any] | None:
        """The reply if it is complete. Call when the channel is readable.

        Raises:
            WorkerDied: the process is gone, or the reply is no reply.
        """
        try:
            data = self.channel.recv(MAX_REPLY_BYTES)
        except ConnectionError:
            data = b""
        if not data:
            raise WorkerDied(self._exit_reason())
        self._buffer += data
        size = int.from_bytes(self._buffer[:HEADER_BYTES], "big")
        if size > MAX_REPLY_BYTES:
            raise WorkerDied("the verifier wrote into its process's channel")
        if len(self._buffer) < HEADER_BYTES + size:
            return None
        payload = bytes(self._buffer[HEADER_BYTES : HEADER_BYTES + size])
        del self._buffer[: HEADER_BYTES + size]
        try:
            return json.loads(payload)
        except ValueError:
            raise WorkerDied("the verifier wrote into its process's channel") from None

    def rest(self) -> None:
        self.is_ready, self.task, self.deadline = True, None, float("inf")

    def kill(self) -> None:
        """Ends the process and whatever it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.channel.close()

    def _exit_reason(self) -> str:
        try:
            status = self._process.wait(LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            return "the verifier closed its process's channel"
        if status < 0:
            return f"the verifier's process died of {signal.Signals(-status).name}"
        return f"the verifier ended its process with exit code {status}"


def _environment() -> dict[str, str]:
    """The trainer's own, with its import path; one thread, since many workers share the host's cores."""
    path = [str(Path(entry).absolute()) for entry in sys.path]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(path)}
