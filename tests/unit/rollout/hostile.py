"""An engine and a grader that do everything they may at the worst moment, and Algorithm 1 read one prompt at a time.

What a policy answers is a function of its version, the prompt and the seed; when the answer comes is drawn at random.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

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

    def text(self, uid: int, seed: int) -> str:
        draw, kind = self._draw(seed, 0), self.kinds[uid % ROWS]
        if draw % 100 < 3:
            return "hangs the verifier"
        if kind < self.hardness:
            return "right" if kind < self.hardness / 2 else "wrong"
        return ("right", "wrong", "wrong")[draw // 100 % 3]

    def token(self, version: int, seed: int, position: int) -> tuple[int, float]:
        """The token there, and its log-probability under the policy that samples it."""
        token = self._draw(seed, position + 1) % 100
        return token, -0.01 * token - version

    def respond(self, prompt: Prompt, version: int, seed: int, partial: Response | None = None) -> Response:
        """From its beginning, or behind what an earlier policy has sampled of it."""
        before = partial.token_ids if partial else ()
        length = max(2 + self._draw(seed, 0) % 3, len(before) + 1)
        sampled = [self.token(version, seed, position) for position in range(len(before), length)]
        return Response(
            (*before, *(token for token, _ in sampled)),
            (*(partial.logprobs if partial else ()), *(logprob for _, logprob in sampled)),
            self.text(prompt.uid, seed),
            FinishReason.STOP,
            partial.version if partial else version,
            continued=(*partial.continued, (len(before), version)) if partial else (),
        )

    def _draw(self, seed: int, number: int) -> int:
        mixed = (seed + self.number * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03) * 0x94D049BB133111EB
        return (mixed & (1 << 64) - 1) >> 32


def judge(response: Response) -> Verdict:
    if response.text.startswith("hangs"):
        return Verdict(0.0, -1.0, Outcome.TIMEOUT, "no verdict")
    return Verdict(float(response.text == "right"), 1.0 if response.text == "right" else -1.0)


def read_sequentially(
    world: World,
    position: int,
    version: int,
    run_seed: int,
    *,
    wanted: int,
    budget: int,
    n: int,
    max_samples: int,
    filters: bool,
) -> tuple[dict[int, list[Response]], int]:
    """Uids and responses of the groups that Algorithm 1 trains on, sampling a prompt at a time; the next position."""
    chosen: dict[int, list[Response]] = {}
    first = position
    while len(chosen) < wanted and position - first < budget:
        prompt, responses, marks = world.prompt(position), [], set()
        while len(responses) < n or (filters and len(marks) < 2 and len(responses) < max_samples):
            for _ in range(min(n, max(n, max_samples) - len(responses))):
                seed = request_seed(run_seed, version, position, len(responses))
                responses.append(world.respond(prompt, version, seed))
            marks = {judge(r).accuracy for r in responses if judge(r).outcome is Outcome.GRADED}
        if len(marks) == 2 or not filters:
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
    submitted: list[Key] = field(default_factory=list)  # under this version, as often as it was
    sampled: dict[Key, Response] = field(default_factory=dict)  # under this version, cut ones too
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
        finished = [Finished(request, self._respond(request)) for request in map(self.waiting.pop, done)]
        self.sampled |= {one.request.key: one.response for one in finished}
        return finished

    def abort(self, keys: Collection[Key]) -> list[Finished]:
        gone = [self.waiting.pop(key) for key in keys if key in self.waiting]
        begun = [Finished(request, self._cut(request)) for request in gone if self.draw.random() < 0.5]
        self.sampled |= {one.request.key: one.response for one in begun}
        return begun

    def load(self, weights: object, version: int) -> None:
        assert not self.waiting, "weights change under requests in flight"
        self.version = version
        self.submitted, self.sampled = [], {}

    def _respond(self, request: Request) -> Response:
        return self.world.respond(request.prompt, self.version, request.seed, request.partial)

    def _cut(self, request: Request) -> Response:
        whole, before = self._respond(request), len(request.partial.token_ids) if request.partial else 0
        kept = self.draw.randint(before + 1, len(whole.token_ids))
        return replace(
            whole,
            token_ids=whole.token_ids[:kept],
            logprobs=whole.logprobs[:kept],
            finish_reason=FinishReason.ABORTED,
            text="cut",
        )

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
