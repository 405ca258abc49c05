"""One step's requests on their way through bank, engine and grader, as its `Fill` decides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from dapo_mcore.rollout.bank import Bank, Banked
from dapo_mcore.rollout.engine import Key, Request
from dapo_mcore.rollout.fill import Fill, OpenGroup
from dapo_mcore.rollout.pipeline import Pipeline
from dapo_mcore.types import Prompt, Response, Sample, Verdict

RUN_AHEAD = 1.25  # responses in flight per response that the engine decodes: what may finish between two polls


@dataclass(slots=True)
class Wave:
    fill: Fill
    pipeline: Pipeline
    bank: Bank
    prompt_at: Callable[[int], Prompt]
    rate_of: Callable[[int], float]  # data-set row -> chance that its group passes
    seed_of: Callable[[Key], int]
    left: dict[Key, Response] = field(default_factory=dict)  # not graded when they were given up; cut or whole
    from_bank: int = 0  # groups that an earlier step has sampled and graded
    given_up: int = 0  # groups that were begun and, before it was certain which are committed, turned out too many

    def advance(self) -> None:
        """Begin what may be needed, sample and grade for a while, give up what is needed no longer."""
        room = RUN_AHEAD * self.pipeline.engine.capacity
        while self.fill.wants_more() and len(self.pipeline.requests) < room:
            self._begin(self.prompt_at(self.fill.next_position))
        self._take(self.pipeline.advance())
        if self.fill.is_determined:
            self.left |= self._abort_from(self.fill.cursor)
        elif not self.bank.staleness:  # otherwise later steps have a use for them
            self._give_up()

    def to_bank(self, groups: Iterable[OpenGroup], left: Mapping[Key, Response]) -> None:
        """What was sampled of these groups, and what is left of their other responses."""
        for group in groups:
            for index, sample in group.samples.items():
                self.bank.keep((group.prompt.uid, index), Banked(sample.response, sample.verdict))
        for key, response in left.items():
            self.bank.keep(key, Banked(response))

    def _give_up(self) -> None:
        """Abort what turns out to be more than enough."""
        if groups := self.fill.give_up():
            self.given_up += len(groups)
            self.to_bank(groups, self._abort_from(self.fill.next_position))

    def _abort_from(self, position: int) -> dict[Key, Response]:
        return self.pipeline.abort([key for key in self.pipeline.keys if key[0] >= position])

    def _begin(self, prompt: Prompt) -> None:
        is_banked = self.bank.holds_group(prompt.uid, self.fill.group_size)
        self.from_bank += is_banked
        self._ask(prompt, self.fill.begin(prompt, self.rate_of(prompt.row), free=is_banked))

    def _ask(self, prompt: Prompt, indices: Iterable[int]) -> None:
        """Responses of a prompt: from the bank, as far as it has them."""
        requests: list[Request] = []
        known: list[tuple[Key, Sample]] = []
        for key in ((prompt.uid, index) for index in indices):
            match self.bank.take(key):
                case None:
                    requests.append(Request(prompt, key[1], self.seed_of(key)))
                case Banked(is_cut=True, response=response):
                    requests.append(Request(prompt, key[1], self.seed_of(key), partial=response))
                case Banked(response=response, verdict=Verdict() as verdict):
                    known.append((key, Sample(response, verdict)))
                case Banked(response=response):
                    self.pipeline.grade(prompt, key, response)
        self.pipeline.sample(requests)
        self._take(known)

    def _take(self, samples: Iterable[tuple[Key, Sample]]) -> None:
        for (uid, index), sample in samples:
            if more := self.fill.record(uid, index, sample):
                self._ask(self.fill.groups[uid].prompt, more)
