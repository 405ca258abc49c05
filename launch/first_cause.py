"""What is said last when a rank has died: which was the first, and of what. Standard library only."""

from __future__ import annotations

import signal

HINTS = {
    "SIGKILL": "nobody in the run sends that: mostly the kernel, for want of memory (dmesg), or a scheduler",
    "SIGSEGV": "a crash in native code; PYTHONFAULTHANDLER=1 shows where",
    "SIGABRT": "a library gave up; its reason is above",
    "SIGBUS": "mostly a full /dev/shm",
}


def first_cause(who: str, exit_code: int, where: str) -> str:
    """A line for stderr. A rank that ends by itself has told why, `where` says; one that was ended could not."""
    if exit_code >= 0:
        return f"launch: {who} failed first, with exit code {exit_code}; its error is {where}"
    name = signal.Signals(-exit_code).name
    return f"error: {who} was ended by {name}, before any other failed ({HINTS.get(name, 'somebody ended it')})"
