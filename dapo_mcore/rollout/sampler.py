"""Dynamic sampling (DAPO section 3.2, eq. 11): draw groups until enough of them carry a gradient.

The batch is the first `wanted` passing groups in prompt order, so it does not depend on which response was finished
first nor on how many prompts a round speculates on: prompts behind the last committed one are not consumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from dapo_mcore.algo.groups import Commit, commit_in_order, passes_filter
from dapo_mcore.algo.metrics import filter_metrics, response_metrics, reward_metrics
from dapo_mcore.config import OnExhausted
from dapo_mcore.observe.metrics import Ratio
from dapo_mcore.rollout.engine import RolloutEngine, Sampling
from dapo_mcore.rollout.groups import Grading, sample_groups
from dapo_mcore.rollout.leader import StopRun
from dapo_mcore.types import Group, Prompt

SPECULATION = 1.3  # prompts sampled per group still missing, when data.gen_batch_size does not say


class PromptStream(Protocol):
    """The shuffled prompts of the run, in an order fixed by its seed."""

    @property
    def position(self) -> int:
        """The first prompt that is not consumed."""
        ...

    def peek(self, start: int, count: int) -> list[Prompt]: ...

    def commit(self, position: int) -> None:
        """Everything before `position` is consumed."""
        ...


@dataclass(frozen=True, slots=True)
class Collected:
    """What one step trains on, and what was sampled on the way to it."""

    groups: tuple[Group, ...]  # committed: passing, in prompt order
    considered: tuple[Group, ...]  # all up to the last committed one: what sequential sampling would have drawn
    sampled: tuple[Group, ...]  # all, speculative ones behind the last committed group included
    rounds: int

    def metrics(self) -> dict[str, Ratio]:
        return {
            **reward_metrics(self.considered),
            **filter_metrics(self.considered),
            **response_metrics(self.groups),
            "rollout/groups_sampled": Ratio(len(self.sampled), 1),
            "rollout/groups_trained": Ratio(len(self.groups), 1),
            "rollout/num_gen_batches": Ratio(self.rounds, 1),
            "rollout/generated_per_trained_token": Ratio(_tokens(self.sampled), _tokens(self.groups)),
        }


@dataclass(frozen=True, slots=True)
class Sampler:
    """Collects the groups of one training step, in rounds. Runs on rank 0; the engine reaches the other ranks."""

    engine: RolloutEngine
    prompts: PromptStream
    grader: Grading
    sampling: Sampling
    group_size: int  # G
    seed: int
    wanted: int  # groups per step, N of Algorithm 1
    per_round: int  # prompts sampled per round; 0: those still missing, times SPECULATION
    max_rounds: int
    on_exhausted: OnExhausted
    passes: Callable[[Group], bool] = passes_filter

    def collect(self) -> Collected:
        """Sample until `wanted` groups passed or `max_rounds` are spent.

        Raises:
            StopRun: the rounds are spent and nothing passed, or on_exhausted says to stop. The prompts of this step
                are then not consumed: a resumed run meets them again.
        """
        start = self.prompts.position
        groups: list[Group] = []
        commit, rounds = Commit([], start), 0
        while len(commit.accepted) < self.wanted and rounds < self.max_rounds:
            groups += self._sample(start + len(groups), self.per_round or self._speculate(commit))
            rounds += 1
            verdicts = {start + i: self.passes(group) for i, group in enumerate(groups)}
            commit = commit_in_order(verdicts, start, self.wanted)
        considered = groups[: commit.cursor - start]
        self._refuse_to_starve(len(commit.accepted), considered)
        self.prompts.commit(commit.cursor)
        committed = tuple(groups[position - start] for position in commit.accepted)
        return Collected(committed, tuple(considered), tuple(groups), rounds)

    def _speculate(self, commit: Commit) -> int:
        missing = self.wanted - len(commit.accepted)
        return math.ceil(missing * SPECULATION) if self.passes is passes_filter else missing

    def _sample(self, start: int, count: int) -> list[Group]:
        return sample_groups(
            self.engine,
            self.grader,
            self.prompts.peek(start, count),
            self.sampling,
            n=self.group_size,
            seed=self.seed,
            version=self.engine.version,
        )

    def _refuse_to_starve(self, accepted: int, considered: list[Group]) -> None:
        """Fewer groups than wanted are trained on only when there are any and on_exhausted allows it."""
        if accepted == self.wanted or (accepted and self.on_exhausted is OnExhausted.train_partial):
            return
        shares = filter_metrics(considered)
        right, wrong = (round(shares[f"rollout/all_{which}_fraction"].total) for which in ("right", "wrong"))
        state, cure = ("solved", "harder") if right > wrong else ("too hard for this policy", "easier")
        raise StopRun(
            f"{accepted} of {self.wanted} groups passed the filter in algorithm.filter_groups.max_num_gen_batches="
            f"{self.max_rounds} rounds; of {len(considered)} groups {right} were all right and {wrong} all wrong: the "
            f"data looks {state}. Give {cure} problems, raise max_num_gen_batches, or set "
            "algorithm.filter_groups.on_exhausted=train_partial"
        )


def every_group(group: Group) -> bool:
    """The filter of plain GRPO (algorithm.filter_groups.enable=false)."""
    return True


def _tokens(groups: tuple[Group, ...]) -> int:
    return sum(len(sample.response.token_ids) for group in groups for sample in group.samples)
