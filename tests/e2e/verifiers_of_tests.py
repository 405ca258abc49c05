"""Verifiers that the end-to-end tests name as reward.verifier."""

import time
from collections.abc import Mapping


def even_length(response: str, answer: str, metadata: Mapping[str, object]) -> bool:
    """Right about half of the time whatever the policy says, so that groups are mixed."""
    return len(response) % 2 == 0


def always_right(response: str, answer: str, metadata: Mapping[str, object]) -> bool:
    return True


def beyond_float32(response: str, answer: str, metadata: Mapping[str, object]) -> dict[str, float]:
    """A finite score, which training cannot take: every rank finds out."""
    return {"score": 1e300, "acc": float(even_length(response, answer, metadata))}


def broken(response: str, answer: str, metadata: Mapping[str, object]) -> bool:
    raise RuntimeError("no calculator here")


def hanging(response: str, answer: str, metadata: Mapping[str, object]) -> bool:
    while True:
        time.sleep(1)
