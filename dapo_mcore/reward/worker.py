"""A grading process: `python -m dapo_mcore.reward.worker DESCRIPTOR VERIFIER TIMEOUT_S`, started by the pool.

Requests are pickles of (response text, gold answer, metadata) and come from the trusted side. Replies are JSON, because
what a verifier makes of a model's text is not trusted. The verifier runs on the main thread.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import socket
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from dapo_mcore.reward.errors import VerifierError
from dapo_mcore.reward.frames import frame, receive
from dapo_mcore.reward.verifiers import Verifier, load_verifier

MEMORY_LIMIT_BYTES = 4 << 30  # of private data; beyond it allocations raise MemoryError
DETAIL_CHARS = 500
ORPHAN_GRACE_S = 30.0  # past the deadline: then nobody is left who would have killed this process


def main(descriptor: int, name: str, timeout_s: float) -> None:
    channel = socket.socket(fileno=descriptor)
    _limit(resource.RLIMIT_DATA, MEMORY_LIMIT_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # asks the trainer to end after its step; Slurm sends it to all
    try:
        verifier = load_verifier(name)
    except Exception as error:  # noqa: BLE001  a user's module may raise anything; the pool turns it into one message
        is_told = isinstance(error, VerifierError)
        _send(channel, refused=str(error) if is_told else f"reward.verifier={name}: {_told(error)}")
        return
    _send(channel, ready=True)
    _silence()
    while (request := receive(channel)) is not None:
        signal.setitimer(signal.ITIMER_REAL, timeout_s + ORPHAN_GRACE_S)
        reply = _graded(verifier, request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(channel, **reply)


def _graded(verifier: Verifier, request: bytes) -> dict[str, float | str]:
    try:
        verdict = verifier(*pickle.loads(request))
    except Exception as error:  # noqa: BLE001  counted as an error of this one response
        return {"error": _told(error)}
    return {"accuracy": verdict.accuracy, "score": verdict.score}


def _told(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error}"[:DETAIL_CHARS] + f" ({Path(last.filename).name}:{last.lineno})"


def _send(channel: socket.socket, **message: float | str) -> None:
    channel.sendall(frame(json.dumps(message).encode()))


def _limit(what: int, value: int) -> None:
    _, hard = resource.getrlimit(what)
    ceiling = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (ceiling, ceiling))


def _silence() -> None:
    """Whatever a verifier prints is dropped: it may be a gigabyte."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


if __name__ == "__main__":
    with suppress(ConnectionError):  # the trainer is gone, and told its user why
        main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
