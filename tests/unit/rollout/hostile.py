"""An engine and a grader that do everything they may at the worst moment, and Algorithm 1 read one prompt at a time.

What a policy answers is a function of its version, the prompt and the seed; when the answer comes is drawn at random.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

from dapo_mcore.rollout.engine import Finished, Key, Request, Sampling, request_seed
from dapo_mcore.types import FinishReason, Outcome, Prompt, Response, Verdict

ROWS = 37  # of the data set, met again epoch after epoch
REPLICAS = 3


@dataclass(frozen=True)
class World:
    """The data and what each policy can do with it."""

    number: int
    hardness: float  # share of the rows that are answered all right or all wrong

    @cached_property
    def kinds(self) -> list[float]:
        draw = random.Random(self.number)
        return [draw.random() for _ in range(ROWS)]

    def prompt(self, uid: int) -> Prompt:
        return Prompt(uid, uid % ROWS, (1, 2, 3), f"question {uid % ROWS}", "right")

    def respond(self, prompt: Prompt, version: int, seed: int) -> Response:
        return respond(self, prompt.uid, version, seed)


@lru_cache(maxsize=4096)
def respond(world: World, uid: int, version: int, seed: int) -> Response:
    draw = random.Random(f"{world.number}/{version}/{uid}/{seed}")
    number, kind = draw.randrange(100), world.kinds[uid % ROWS]
    if draw.random() < 0.03:
        text = "hangs the verifier"
    elif kind < world.hardness:
        text = "right" if kind < world.hardness / 2 else "wrong"
    else:
        text = draw.choice(["right", "wrong", "wrong"])
    return Response((number, version), (-0.1 * number, -0.5), text, FinishReason.STOP, version)


def judge(response: Response) -> Verdict:
    if response.text.startswith("hangs"):
        return Verdict(0.0, -1.0, Outcome.TIMEOUT, "no verdict")
    return Verdict(float(response.text == "right"), 1.0 if response.text == "right" else -1.0)


def read_sequentially(
    world: World, position: int, version: int, run_seed: int, *, wanted: int, budget: int, n: int, max_samples: int
) -> tuple[dict[int, list[Response]], int]:
    """Uids and responses of the groups that Algorithm 1 trains on, sampling a prompt at a time; the next position."""
    chosen: dict[int, list[Response]] = {}
    first = position
    while len(chosen) < wanted and position - first < budget:
        prompt, responses, marks = world.prompt(position), [], set()
        while len(responses) < n or (len(marks) < 2 and len(responses) < max_samples):
            for _ in range(min(n, max(n, max_samples) - len(responses))):
                seed = request_seed(run_seed, version, position, len(responses))
                responses.append(world.respond(prompt, version, seed))
            marks = {judge(r).accuracy for r in responses if judge(r).outcome is Outcome.GRADED}
        if len(marks) == 2:
            chosen[position] = responses
        position += 1
    return chosen, position


class Crash(Exception):
    """The process is gone."""


@dataclass
class HostileEngine:
    """Responses take any number of polls; replicas die and their requests start over; the process may die too."""

    world: World
    draw: random.Random
    capacity: int
    polls_to_live: int = 1 << 30
    version: int = 0
    submitted: list[Key] = field(default_factory=list)  # every key, as often as it was submitted
    waiting: dict[Key, Request] = field(default_factory=dict)  # in flight, in the order of submission
    polls: dict[Key, int] = field(default_factory=dict)  # that each still takes
    homes: dict[Key, int] = field(default_factory=dict)

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        for request in requests:
            assert request.key not in self.waiting, "in flight already"
            self.submitted.append(request.key)
            self.waiting[request.key] = request
            self._start(request.key)

    def poll(self) -> list[Finished]:
        self.polls_to_live -= 1
        if self.polls_to_live < 0:
            raise Crash
        if self.draw.random() < 0.05:
            self._lose_replica()
        running = list(self.waiting)[: self.capacity]
        for key in running:
            self.polls[key] -= 1
        done = [key for key in running if self.polls[key] <= 0]
        self.draw.shuffle(done)
        return [Finished(request, self._respond(request)) for request in map(self.waiting.pop, done)]

    def abort(self, keys: Collection[Key]) -> list[Finished]:
        gone = [self.waiting.pop(key) for key in keys if key in self.waiting]
        return [
            Finished(request, replace(self._respond(request), finish_reason=FinishReason.ABORTED, text="cut"))
            for request in gone
            if self.draw.random() < 0.5  # some had begun
        ]

    def load(self, weights: object, version: int) -> None:
        assert not self.waiting, "weights change under requests in flight"
        self.version = version

    def _respond(self, request: Request) -> Response:
        return self.world.respond(request.prompt, self.version, request.seed)

    def _start(self, key: Key) -> None:
        self.homes[key] = self.draw.randrange(REPLICAS)
        self.polls[key] = self.draw.choice([1, 1, 2, 3, 12])

    def _lose_replica(self) -> None:
        dead = self.draw.randrange(REPLICAS)
        for key in self.waiting:
            if self.homes[key] == dead:
                self._start(key)


@dataclass
class HostileGrader:
    """Verdicts come late and out of order."""

    draw: random.Random
    pending: list[tuple[Key, Verdict]] = field(default_factory=list)

    def submit(self, key: Key, prompt: Prompt, response: Response) -> None:
        assert response.finish_reason is not FinishReason.ABORTED, "graded although it was interrupted"
        self.pending.append((key, judge(response)))

    def poll(self, wait: bool) -> list[tuple[Key, Verdict]]:
        self.draw.shuffle(self.pending)
        number = self.draw.randint(min(wait, len(self.pending)), len(self.pending))
        ready, self.pending = self.pending[:number], self.pending[number:]
        return ready

    def abort(self, keys: Collection[Key]) -> None:
        self.pending = [entry for entry in self.pending if entry[0] not in keys]

    def grade(self, items: Sequence[tuple[Prompt, Response]]) -> list[Verdict]:
        return [judge(response) for _, response in items]


@dataclass
class Stream:
    world: World
    position: int = 0

    def peek(self, start: int, count: int) -> list[Prompt]:
        assert start >= self.position, "prompts that are consumed"
        return [self.world.prompt(uid) for uid in range(start, start + count)]

    def commit(self, position: int) -> None:
        assert position >= self.position
        self.position = position
