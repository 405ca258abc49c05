"""What sampling asks of a rollout engine."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dapo_mcore.types import Prompt, Response

if TYPE_CHECKING:
    from torch import Tensor

Key = tuple[int, int]  # (prompt uid, sample index): names a response, before and after it is sampled


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
    partial: Response | None = None  # sampled under an earlier version and aborted: go on behind its tokens

    @property
    def key(self) -> Key:
        return self.prompt.uid, self.index

    @property
    def sampled(self) -> tuple[int, ...]:
        """The tokens of the response that are there already."""
        return self.partial.token_ids if self.partial else ()


@dataclass(frozen=True, slots=True)
class Finished:
    request: Request
    response: Response  # whole: with a continued request's partial at its beginning

    @property
    def answer(self) -> Answer:
        return Answer(self.request.key, self.request.seed, self.response)


@dataclass(frozen=True, slots=True)
class Answer:
    """A `Finished` on its way to the process that knows the request: pictures travel to an engine, and not back."""

    key: Key
    seed: int  # of the request: its key may have been asked for again meanwhile
    response: Response


def request_seed(run_seed: int, version: int, prompt_uid: int, index: int) -> int:
    """A seed in [0, 2**63) that depends on what is sampled, never on when or where."""
    key = f"{run_seed}/{version}/{prompt_uid}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def requests_for(prompts: Iterable[Prompt], n: int, run_seed: int, version: int) -> list[Request]:
    """`n` requests per prompt, prompt after prompt."""
    return [Request(p, i, request_seed(run_seed, version, p.uid, i)) for p in prompts for i in range(n)]


class Decoder(Protocol):
    """Samples responses under one policy version.

    A response depends on the weights, the prompt, the sampling and the seed of its request; never on what else is
    sampled, where, or when.
    """

    @property
    def version(self) -> int:
        """Of the weights it samples with; -1 before the first load."""
        ...

    @property
    def capacity(self) -> int:
        """Responses decoded together, over all replicas: what is submitted beyond waits."""
        ...

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Queue `requests`; they start in this order as room allows. A key is in flight once."""
        ...

    def poll(self) -> list[Finished]:
        """Advance by a slice of decoding at most; what has finished since the last call, each request once.

        In no particular order; empty when nothing has. Returns at once with nothing in flight.
        """
        ...

    def abort(self, keys: Collection[Key]) -> list[Finished]:
        """Forget these requests; keys that are not in flight are ignored.

        Returns what those that had begun have sampled so far, as responses with `FinishReason.ABORTED`; an engine
        that cannot tell returns nothing. None of these keys comes out of `poll` afterwards.
        """
        ...


class RolloutEngine(Decoder, Protocol):
    """A decoder over the ranks of the trainer.

    Rank 0 leads: `submit`, `poll` and `abort` run there, while every other rank stands in `follow` until the leader's
    `release`. `load` is collective, and called with nothing in flight.
    """

    def follow(self) -> None:
        """Take part in what the leader does until it releases. Other ranks only; returns at once on rank 0."""
        ...

    def release(self) -> None:
        """Let the followers go on. Leader only."""
        ...

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over `weights` (HF name, full tensor), drop every cache that saw the old ones. Collective."""
        ...

    def wake(self) -> None:
        """After `load`: take back what else is needed to sample. Every rank."""
        ...

    def sleep(self) -> None:
        """Leave memory that the trainer shares to the trainer; the weights may be lost. Every rank."""
        ...


def generate(engine: Decoder, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
    """Responses in the order of `requests`, whatever finished first; nothing else may be in flight."""
    engine.submit(requests, sampling)
    responses: dict[Key, Response] = {}
    while len(responses) < len(requests):
        responses |= {finished.request.key: finished.response for finished in engine.poll()}
    return [responses[request.key] for request in requests]
