"""A verifier that no policy can please or displease: groups are mixed whatever it says, so that every step trains."""

from __future__ import annotations

from collections.abc import Mapping


def even_length(response: str, answer: str, metadata: Mapping[str, object]) -> bool:
    """Right about half of the time."""
    return len(response) % 2 == 0
