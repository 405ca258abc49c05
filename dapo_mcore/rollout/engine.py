"""What the sampler asks of a rollout engine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dapo_mcore.types import Prompt, Response

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """How responses are drawn."""

    temperature: float  # 0: greedy
    max_tokens: int
    top_p: float = 1.0
    top_k: int = -1  # -1: all
    routes: bool = False  # responses carry the experts of their tokens; needs an engine built for it


@dataclass(frozen=True, slots=True)
class Request:
    """One response wanted: the `index`-th of a prompt, drawn with its own seed."""

    prompt: Prompt
    index: int
    seed: int


def request_seed(run_seed: int, version: int, prompt_uid: int, index: int) -> int:
    """A seed in [0, 2**63) that depends on what is sampled, never on when or where."""
    key = f"{run_seed}/{version}/{prompt_uid}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def requests_for(prompts: Iterable[Prompt], n: int, run_seed: int, version: int) -> list[Request]:
    """`n` requests per prompt, prompt after prompt."""
    return [Request(p, i, request_seed(run_seed, version, p.uid, i)) for p in prompts for i in range(n)]


class RolloutEngine(Protocol):
    """Samples responses under one policy version.

    Rank 0 leads: `generate` runs there, while every other rank stands in `follow` until the leader's `release`.
    `load` is collective.
    """

    @property
    def version(self) -> int:
        """Of the weights it samples with; -1 before the first load."""
        ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        """Responses in the order of `requests`, whatever finished first. Leader only."""
        ...

    def follow(self) -> None:
        """Take part in the leader's `generate` calls until it releases. Other ranks only; returns at once on rank 0."""
        ...

    def release(self) -> None:
        """Let the followers go on. Leader only."""
        ...

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over `weights` (HF name, full tensor), drop every cache that saw the old ones. Collective."""
        ...
