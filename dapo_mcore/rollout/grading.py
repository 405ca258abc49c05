"""What sampling asks of a grader."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from dapo_mcore.rollout.engine import Key
from dapo_mcore.types import Prompt, Response, Verdict


class Grading(Protocol):
    """Judges responses while others are still sampled."""

    def submit(self, key: Key, prompt: Prompt, response: Response) -> None:
        """Queue a response under a key that no response in the queue has."""
        ...

    def poll(self, wait: bool) -> list[tuple[Key, Verdict]]:
        """The verdicts since the last call, each once; with `wait` at least one, if any is outstanding."""
        ...

    def abort(self, keys: Collection[Key]) -> None:
        """Forget these; no verdict on them comes out of `poll`, and the keys can be used again."""
        ...

    def grade(self, items: Sequence[tuple[Prompt, Response]]) -> list[Verdict]:
        """Verdicts in the order of `items`; nothing else may be queued."""
        ...
