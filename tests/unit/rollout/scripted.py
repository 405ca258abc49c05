"""A rollout engine and a prompt stream that follow a script: what the policy can do is written down per prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from dapo_mcore.rollout.engine import Request, Sampling
from dapo_mcore.types import FinishReason, Prompt, Response, Verdict


@dataclass
class ScriptedEngine:
    """Answers sample `index` of prompt `uid` with `answer(uid, index)`."""

    answer: Callable[[int, int], str]
    version: int = 0
    requests: list[Request] = field(default_factory=list)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        self.requests += requests
        return [self._response(self.answer(q.prompt.uid, q.index)) for q in requests]

    def _response(self, text: str) -> Response:
        tokens = tuple(range(len(text)))
        return Response(tokens, tuple(-0.5 for _ in tokens), text, FinishReason.STOP, self.version)

    def follow(self) -> None: ...

    def release(self) -> None: ...

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


class ExactGrader:
    def grade(self, items: Sequence[tuple[Prompt, Response]]) -> list[Verdict]:
        marks = [response.text == prompt.answer for prompt, response in items]
        return [Verdict(accuracy=float(mark), score=1.0 if mark else -1.0) for mark in marks]
