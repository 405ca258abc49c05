"""Verifiers that the end-to-end tests name as reward.verifier."""

import time
from collections.abc import Mapping


def even_length(response: str, answer: str, metadata: Mapping[str, object]) -> bool:
    """Right about half of the time whatever the policy says, so that groups are mixed."""
    return len(response) % 2 == 0


def always_right(response: str, answer: str, metadata: Mapping[str, object]) -> bool:
    return True


def broken(response: str, answer: str, metadata: Mapping[str, object]) -> bool:
    raise RuntimeError("no calculator here")


def hanging(response: str, answer: str, metadata: Mapping[str, object]) -> bool:
    while True:
        time.sleep(1)
