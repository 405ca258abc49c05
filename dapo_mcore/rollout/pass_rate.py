"""How many of the groups begun will pass the filter: what decides how far ahead to sample, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dapo_mcore.algo.groups import graded_accuracies, passes_filter
from dapo_mcore.types import Group

PRIOR = 2.0  # passing and failing groups that were not seen: Beta(2, 2)
MEMORY = 0.8  # share of the evidence that a step leaves to the next one: the policy moves
CONFIDENCE = 1.2816  # standard deviations below the mean that 0.9 of a normal distribution lie above
UNSEEN = 0


@dataclass(slots=True)
class PassRate:
    """Posterior of the pass rate, for prompts met before apart by how hard they were then.

    What it knows is a function of the groups it was shown: the same in a resumed run.
    """

    passed: dict[int, float] = field(default_factory=dict)  # difficulty -> groups, faded
    failed: dict[int, float] = field(default_factory=dict)
    difficulties: dict[int, int] = field(default_factory=dict)  # row -> how hard it was when last met

    def of(self, row: int) -> float:
        """Probability, in (0, 1), that the group of a data-set row passes."""
        return self._mean(self.difficulties.get(row, UNSEEN))

    @property
    def mean(self) -> float:
        """Over the prompts met lately, whatever their difficulty."""
        passed, failed = sum(self.passed.values()), sum(self.failed.values())
        return (PRIOR + passed) / (2 * PRIOR + passed + failed)

    def learn(self, groups: Iterable[Group]) -> None:
        """Take a step's groups in: those read in prompt order, since the ones decided first are a biased sample."""
        for counts in (self.passed, self.failed):
            counts.update({difficulty: MEMORY * count for difficulty, count in counts.items()})
        for group in groups:
            counts = self.passed if passes_filter(group) else self.failed
            before = self.difficulties.get(group.prompt.row, UNSEEN)
            counts[before] = counts.get(before, 0.0) + 1
            self.difficulties[group.prompt.row] = difficulty(group)

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {name: list(getattr(self, name).items()) for name in ("passed", "failed", "difficulties")}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.passed, self.failed, self.difficulties = (
            dict(map(tuple, state[name])) for name in ("passed", "failed", "difficulties")
        )

    def _mean(self, difficulty: int) -> float:
        passed, failed = self.passed.get(difficulty, 0.0), self.failed.get(difficulty, 0.0)
        prior = 2 * PRIOR * (0.5 if difficulty == UNSEEN else self._mean(UNSEEN))
        return (prior + passed) / (2 * PRIOR + passed + failed)


def difficulty(group: Group) -> int:
    """1: no response was right, 5: all were, 2 to 4: in between."""
    accuracies = graded_accuracies(group)
    mean = sum(accuracies) / max(len(accuracies), 1)
    return 1 if mean <= 0 else 5 if mean >= 1 else 2 + min(int(mean * 3), 2)


def chance(rate: float, alike: int, size: int) -> float:
    """That a group passes of which `alike` of `size` responses are graded, all with the same accuracy.

    `rate` is the chance before the first response. Groups that pass are taken to have any share of right responses
    with equal probability: after k responses 2 (size - k) / ((k + 1) (size - 1)) of them still look alike. All of
    those that fail do.
    """
    if alike < 2:
        return rate
    still = 2 * (size - alike) / ((alike + 1) * (size - 1))
    return rate * still / (rate * still + 1 - rate)


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
