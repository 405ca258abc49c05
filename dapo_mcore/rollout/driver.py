"""Dynamic sampling (DAPO section 3.2, eq. 11): sample ahead, commit what sampling in order would commit.

Algorithm 1 read sequentially decides which groups train (`Fill`); how many prompts are sampled at once, on how many
engines, and what finishes first only decides how long that takes. docs/sampling.md has the rules.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dapo_mcore.algo.groups import passes_filter
from dapo_mcore.algo.metrics import filter_metrics
from dapo_mcore.config import OnExhausted
from dapo_mcore.observe.metrics import Ratio
from dapo_mcore.rollout.bank import Bank
from dapo_mcore.rollout.collected import Collected, tokens_of
from dapo_mcore.rollout.effort import Effort
from dapo_mcore.rollout.engine import Decoder, Key, Sampling, request_seed
from dapo_mcore.rollout.fill import Fill
from dapo_mcore.rollout.grading import Grading
from dapo_mcore.rollout.leader import StopRun
from dapo_mcore.rollout.pass_rate import PassRate
from dapo_mcore.rollout.pipeline import Pipeline
from dapo_mcore.rollout.wave import Wave
from dapo_mcore.types import Group, Prompt


class PromptStream(Protocol):
    """The shuffled prompts of the run, in an order fixed by its seed. A prompt's uid is its position."""

    @property
    def position(self) -> int:
        """The first prompt that is not consumed."""
        ...

    def peek(self, start: int, count: int) -> list[Prompt]: ...

    def commit(self, position: int) -> None:
        """Everything before `position` is consumed."""
        ...


@dataclass(frozen=True, slots=True)
class Driver:
    """Collects the groups of one training step. Runs on rank 0; the engine reaches the other ranks."""

    engine: Decoder
    prompts: PromptStream
    grader: Grading
    sampling: Sampling
    group_size: int  # G
    seed: int
    wanted: int  # groups per step, N of Algorithm 1
    budget: int  # prompts sampled per step at most, in their order: no matter how far ahead was sampled
    on_exhausted: OnExhausted = OnExhausted.train_partial
    passes: Callable[[Group], bool] = passes_filter
    max_samples: int = 0  # a group without variance grows, by group_size, up to so many responses; 0: it does not
    pass_rate: PassRate = field(default_factory=PassRate)  # lives as long as the run, like the bank
    bank: Bank = field(default_factory=lambda: Bank(staleness=0))
    clock: Callable[[], float] = time.monotonic  # for metrics alone

    def collect(self) -> Collected:
        """Sample until it is certain which groups train and all of them are there.

        Raises:
            StopRun: the budget is spent and nothing passed, or on_exhausted says to stop. The prompts of this step
                are then not consumed: a resumed run meets them again.
        """
        wave = self._wave()
        effort = Effort(wave, self.clock)
        while not wave.fill.is_complete:
            wave.advance()
            effort.observe()
        groups = self._commit(wave)
        return Collected(
            groups,
            tuple(wave.fill.considered),
            effort.metrics(tokens_of(groups)),
            {
                "rollout/temperature": Ratio(self.sampling.temperature, 1),
                "rollout/group_size": Ratio(self.group_size, 1),
                "rollout/pass_rate_posterior": Ratio(self.pass_rate.mean, 1),
            },
        )

    def _wave(self) -> Wave:
        version, start = self.engine.version, self.prompts.position
        alike = self.pass_rate.alike(max(self.group_size, self.max_samples))
        self.bank.open(version, [self.group_size, self.sampling.temperature, self.sampling.max_tokens])

        def prompt_at(position: int) -> Prompt:
            return self.prompts.peek(position, 1)[0]

        def seed_of(key: Key) -> int:
            return request_seed(self.seed, version, *key)

        return Wave(
            Fill(start, self.wanted, self.budget, self.group_size, self.max_samples, self.passes, alike),
            Pipeline(self.engine, self.grader, self.sampling),
            self.bank,
            prompt_at,
            self.pass_rate.of,
            seed_of,
        )

    def _commit(self, wave: Wave) -> tuple[Group, ...]:
        """The groups to train on, their prompts consumed: none while they wait for a later step."""
        fill = wave.fill
        groups = tuple(fill.groups[position].close() for position in fill.accepted)
        wave.to_bank(fill.surplus, wave.left)
        if len(groups) < self.wanted and not self._trains_on(groups):
            wave.to_bank(fill.groups.values(), {})
            self._refuse_to_starve(groups, fill.considered)
            return ()
        self.pass_rate.learn(fill.considered, self.group_size)
        self.prompts.commit(fill.cursor)
        return groups

    def _trains_on(self, groups: Sequence[Group]) -> bool:
        """Whether a step may train on fewer groups than wanted."""
        if not groups or self.on_exhausted is OnExhausted.stop:
            return False
        oldest = min(sample.response.version for group in groups for sample in group.samples)
        can_wait = self.engine.version - oldest < self.bank.staleness
        return self.on_exhausted is OnExhausted.train_partial or not can_wait

    def _refuse_to_starve(self, groups: Sequence[Group], considered: Sequence[Group]) -> None:
        if groups and self.on_exhausted is OnExhausted.carry_over:
            return
        shares = filter_metrics(considered)
        right, wrong = (round(shares[f"rollout/all_{which}_fraction"].total) for which in ("right", "wrong"))
        state, cure = ("solved", "harder") if right > wrong else ("too hard for this policy", "easier")
        raise StopRun(
            f"{len(groups)} of {self.wanted} groups passed the filter among the {len(considered)} prompts that "
            f"algorithm.filter_groups.max_num_gen_batches allows; {right} groups were all right and {wrong} all wrong: "
            f"the data looks {state}. Give {cure} problems, raise max_num_gen_batches, or set "
            "algorithm.filter_groups.on_exhausted=train_partial"
        )
