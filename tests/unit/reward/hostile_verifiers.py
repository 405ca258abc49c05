"""Verifiers that do what no verifier should. They run in the pool's worker processes."""

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading

not_a_function = 3


def obey(response, answer, metadata):
    """The response says what happens."""
    return ACTIONS[response]()


def read_other_module(response, answer, metadata):
    return response in sys.modules


def raise_on_everything(response, answer, metadata):
    raise KeyError(answer)


def _wait_for_ever():
    threading.Event().wait()


def _spin():
    while True:
        pass


def _hold_the_interpreter_lock():
    """Backtracks 2**64 times inside one C call: no Python thread, signal handler or alarm gets a turn."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    re.match(r"(x+x+)+y", "x" * 64)


def _segfault():
    ctypes.string_at(0)


def _overflow_memory():
    return len(bytearray(1 << 40)) > 0


def _print_a_gigabyte():
    for _ in range(1_000):
        os.write(1, b"x" * 1_000_000)
    return True


MAX_DESCRIPTOR = 4096  # a long test session has many open files: the worker's channel may have a high number


def _write_into_every_descriptor():
    for descriptor in range(3, MAX_DESCRIPTOR):
        with contextlib.suppress(OSError):
            os.write(descriptor, b"\xff" * 64)
    _wait_for_ever()


def _close_every_descriptor():
    os.closerange(0, MAX_DESCRIPTOR)
    _wait_for_ever()


def _raise():
    raise RuntimeError("no luck today")


ACTIONS = {
    "right": lambda: True,
    "wrong": lambda: False,
    "wait": _wait_for_ever,
    "spin": _spin,
    "hold the lock": _hold_the_interpreter_lock,
    "segfault": _segfault,
    "exit": lambda: os._exit(3),
    "sys.exit": lambda: sys.exit(5),
    "memory": _overflow_memory,
    "recursion": lambda: (lambda f: f(f))(lambda f: f(f)),
    "print": _print_a_gigabyte,
    "scribble": _write_into_every_descriptor,
    "close": _close_every_descriptor,
    "raise": _raise,
    "text": lambda: "yes",
    "abort": os.abort,
}
