"""A rollout engine and a prompt stream that follow a script: what the policy can do is written down per prompt."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from dapo_mcore.rollout.engine import Finished, Key, Request, Sampling
from dapo_mcore.types import FinishReason, Prompt, Response, Verdict


@dataclass
class ScriptedEngine:
    """Answers sample `index` of prompt `uid` with `answer(uid, index)`."""

    answer: Callable[[int, int], str]
    version: int = 0
    capacity: int = 64
    requests: list[Request] = field(default_factory=list)
    _waiting: list[Request] = field(default_factory=list)

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        self.requests += requests
        self._waiting += requests

    def poll(self) -> list[Finished]:
        """All that its capacity holds, the latest first."""
        now, self._waiting = self._waiting[: self.capacity], self._waiting[self.capacity :]
        return [Finished(q, self._response(self.answer(q.prompt.uid, q.index))) for q in reversed(now)]

    def abort(self, keys: Collection[Key]) -> list[Finished]:
        self._waiting = [request for request in self._waiting if request.key not in keys]
        return []

    def _response(self, text: str) -> Response:
        tokens = tuple(range(len(text)))
        return Response(tokens, tuple(-0.5 for _ in tokens), text, FinishReason.STOP, self.version)

    def load(self, weights: Iterable[object], version: int) -> None:
        self.version = version


@dataclass
class CountedStream:
    """Prompt number k asks k and expects "right"."""

    position: int = 0

    def peek(self, start: int, count: int) -> list[Prompt]:
        return [Prompt(uid, uid, (1, 2), str(uid), "right") for uid in range(start, start + count)]

    def commit(self, position: int) -> None:
        self.position = position


@dataclass
class ExactGrader:
    waiting: dict[Key, Verdict] = field(default_factory=dict)

    def submit(self, key: Key, prompt: Prompt, response: Response) -> None:
        assert key not in self.waiting
        (self.waiting[key],) = self.grade([(prompt, response)])

    def poll(self, wait: bool) -> list[tuple[Key, Verdict]]:
        verdicts, self.waiting = list(self.waiting.items()), {}
        return verdicts

    def abort(self, keys: Collection[Key]) -> None:
        self.waiting = {key: verdict for key, verdict in self.waiting.items() if key not in keys}

    def grade(self, items: Sequence[tuple[Prompt, Response]]) -> list[Verdict]:
        marks = [response.text == prompt.answer for prompt, response in items]
        return [Verdict(accuracy=float(mark), score=1.0 if mark else -1.0) for mark in marks]
