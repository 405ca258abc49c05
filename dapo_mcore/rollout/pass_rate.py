"""How many of the groups begun will pass the filter: what decides how far ahead to sample, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dapo_mcore.algo.groups import graded_accuracies, passes_filter
from dapo_mcore.types import Group

PRIOR = 2.0  # passing and failing groups that were not seen: Beta(2, 2)
MEMORY = 0.8  # share of the evidence that a step leaves to the next one: the policy moves
CONFIDENCE = 1.2816  # standard deviations below the mean that 0.9 of a normal distribution lie above
UNSEEN = 0

Seen = TypeVar("Seen")


@dataclass(slots=True)
class PassRate:
    """Posterior of the pass rate, for prompts met before apart by how hard they were then.

    A resumed run knows what the interrupted one knew.
    """

    passed: dict[int, float] = field(default_factory=dict)  # difficulty -> groups, faded
    failed: dict[int, float] = field(default_factory=dict)
    difficulties: dict[int, int] = field(default_factory=dict)  # row -> how hard it was when last met
    # (size, responses graded when the first differed) -> groups that passed, faded
    decided: dict[tuple[int, int], float] = field(default_factory=dict)

    def of(self, row: int) -> float:
        """Probability, in (0, 1), that the group of a data-set row passes."""
        return self._mean(self.difficulties.get(row, UNSEEN))

    @property
    def mean(self) -> float:
        """Over the prompts met lately, whatever their difficulty."""
        passed, failed = sum(self.passed.values()), sum(self.failed.values())
        return (PRIOR + passed) / (2 * PRIOR + passed + failed)

    def alike(self, size: int) -> list[float]:
        """Of groups of `size` that pass, the share whose first k graded responses are alike, for k = 0 .. size.

        Seen, not derived: responses finish in no random order, since right and wrong ones differ in length. Before any
        group was seen the order is taken for random, and every number of right responses for equally likely:
        2 (size - k) / ((k + 1) (size - 1)).
        """
        if size < 2:
            return [1.0] * (size + 1)
        seen = [self.decided.get((size, k), 0.0) for k in range(size + 1)]
        prior = [1.0, *(2 * (size - k) / ((k + 1) * (size - 1)) for k in range(1, size + 1))]
        return [(PRIOR * p + sum(seen[k + 1 :])) / (PRIOR + sum(seen)) for k, p in enumerate(prior)]

    def learn(self, groups: Iterable[Group]) -> None:
        """Take a step's groups in: those read in prompt order, since the ones decided first are a biased sample."""
        self.passed, self.failed = _faded(self.passed), _faded(self.failed)
        for group in groups:
            counts = self.passed if passes_filter(group) else self.failed
            before = self.difficulties.get(group.prompt.row, UNSEEN)
            counts[before] = counts.get(before, 0.0) + 1
            self.difficulties[group.prompt.row] = difficulty(group)

    def learn_order(self, size: int, decided_after: Iterable[int]) -> None:
        """Take in after how many graded responses a step's passing groups of `size` were seen to pass."""
        self.decided = _faded(self.decided)
        for number in decided_after:
            self.decided[size, number] = self.decided.get((size, number), 0.0) + 1

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        counts = {name: list(getattr(self, name).items()) for name in ("passed", "failed", "difficulties")}
        return counts | {"decided": [[*key, count] for key, count in self.decided.items()]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.passed, self.failed, self.difficulties = (
            dict(map(tuple, state[name])) for name in ("passed", "failed", "difficulties")
        )
        self.decided = {(size, number): count for size, number, count in state["decided"]}

    def _mean(self, difficulty: int) -> float:
        passed, failed = self.passed.get(difficulty, 0.0), self.failed.get(difficulty, 0.0)
        prior = 2 * PRIOR * (0.5 if difficulty == UNSEEN else self._mean(UNSEEN))
        return (prior + passed) / (2 * PRIOR + passed + failed)


def _faded(counts: dict[Seen, float]) -> dict[Seen, float]:
    return {seen: MEMORY * count for seen, count in counts.items()}


def difficulty(group: Group) -> int:
    """1: no response was right, 5: all were, 2 to 4: in between."""
    accuracies = graded_accuracies(group)
    mean = sum(accuracies) / max(len(accuracies), 1)
    return 1 if mean <= 0 else 5 if mean >= 1 else 2 + min(int(mean * 3), 2)


def chance(rate: float, alike: float) -> float:
    """That a group passes whose graded responses all have the same accuracy.

    `rate` is the chance before the first response; of the groups that pass, a share `alike` still looks like this.
    All of those that fail do.
    """
    return rate * alike / (rate * alike + 1 - rate)


@dataclass(slots=True)
class Outlook:
    """How many of several independent groups will pass: mean and variance of their number."""

    mean: float = 0.0
    variance: float = 0.0

    def add(self, probability: float) -> None:
        self.mean += probability
        self.variance += probability * (1 - probability)

    def remove(self, probability: float) -> None:
        self.mean -= probability
        self.variance -= probability * (1 - probability)

    def suffices(self, missing: int) -> bool:
        """Whether at least `missing` pass with a probability of about 0.9: normal quantile, continuity-corrected.

        The spread of the posterior itself is not paid for in advance: the rate shows long before the last group is
        done, and what lacks is begun then.
        """
        return missing <= 0 or self.mean - CONFIDENCE * math.sqrt(max(self.variance, 0.0)) >= missing - 0.5
