"""How many of the groups begun will pass the filter: what decides how far ahead to sample, and nothing else."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeVar

from dapo_mcore.algo.groups import graded_accuracies, is_mixed, passes_filter
from dapo_mcore.types import Group, Outcome

PRIOR = 2.0  # passing and failing groups that were not seen: Beta(2, 2)
MEMORY = 0.8  # share of the evidence that a step leaves to the next one: the policy moves
LIKELY, ALL_BUT_CERTAIN = 1.2816, 2.3263  # standard deviations below the mean: 0.9 and 0.99 of a normal lie above
AGES_PER_OCTAVE = 16
ELDEST = 1 << 20  # age of a group that all of its responses leave undecided
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
    revealed: dict[int, float] = field(default_factory=dict)  # age when it showed -> groups that passed, faded

    def of(self, row: int) -> float:
        """Probability, in (0, 1), that the group of a data-set row passes."""
        return self._mean(self.difficulties.get(row, UNSEEN))

    @property
    def mean(self) -> float:
        """Over the prompts met lately, whatever their difficulty."""
        passed, failed = sum(self.passed.values()), sum(self.failed.values())
        return (PRIOR + passed) / (2 * PRIOR + passed + failed)

    def alike(self, size: int) -> Alike:
        """Of groups of `size` that pass, how many look as if they did not, from age to age."""
        return Alike(size, sorted(self.revealed.items()))

    def learn(self, groups: Iterable[Group], size: int) -> None:
        """Take a step's groups in: those read in prompt order, since the ones decided first are a biased sample.

        `size` is what a group has before it grows.
        """
        self.passed, self.failed, self.revealed = _faded(self.passed), _faded(self.failed), _faded(self.revealed)
        for group in groups:
            passes = passes_filter(group)
            counts = self.passed if passes else self.failed
            before = self.difficulties.get(group.prompt.row, UNSEEN)
            counts[before] = counts.get(before, 0.0) + 1
            self.difficulties[group.prompt.row] = difficulty(group)
            if passes:
                age = age_at(revealing_length(group, size))
                self.revealed[age] = self.revealed.get(age, 0.0) + 1

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {name: list(getattr(self, name).items()) for name in self.__slots__}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for name in self.__slots__:
            setattr(self, name, dict(map(tuple, state[name])))

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


def revealing_length(group: Group, size: int) -> float:
    """Tokens after which a passing group shows it: those of its first `size` responses that are no longer differ.

    Infinity when only further responses show it.
    """
    graded = sorted(
        (len(sample.response.token_ids), sample.verdict.accuracy)
        for sample in group.samples[:size]
        if sample.verdict.outcome is Outcome.GRADED
    )
    return next((length for length, accuracy in graded if is_mixed([graded[0][1], accuracy])), math.inf)


def age_at(length: float) -> int:
    """Counts lengths in steps of a sixteenth of an octave."""
    return ELDEST if length == math.inf else round(AGES_PER_OCTAVE * math.log2(max(length, 1)))


class Alike:
    """Of the groups that pass, the share whose graded responses are all alike so far.

    It is a function of how long a group's responses have been sampled for, not of how many of them are done: groups of
    which many are done early are short ones, and pass less often or more often than others.
    """

    def __init__(self, size: int, revealed: Sequence[tuple[int, float]]) -> None:
        """`revealed`: ages, ascending, and how many passing groups had two different responses from there on."""
        self._size = size
        self._ages = [age for age, _ in revealed]
        self._later = list(accumulate((number for _, number in reversed(revealed)), initial=0.0))[::-1]

    def share(self, graded: int, age: int) -> float:
        """At `age`, with so many responses graded.

        Before any group was seen right and wrong responses are taken to be equally long, and every number of right
        ones for equally likely: 2 (size - k) / ((k + 1) (size - 1)) with k graded.
        """
        if self._size < 2:
            return 1.0
        prior = min(1.0, 2 * (self._size - graded) / ((graded + 1) * (self._size - 1)))
        later = self._later[bisect_right(self._ages, age)]
        return (PRIOR * prior + later) / (PRIOR + self._later[0])


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

    @classmethod
    def of(cls, probabilities: Sequence[float]) -> Outlook:
        return cls(sum(probabilities), sum(p * (1 - p) for p in probabilities))

    def add(self, probability: float) -> None:
        self.mean += probability
        self.variance += probability * (1 - probability)

    def remove(self, probability: float) -> None:
        self.mean -= probability
        self.variance -= probability * (1 - probability)

    def suffices(self, missing: int, deviations: float = LIKELY) -> bool:
        """Whether at least `missing` pass, likely: normal quantile, continuity-corrected.

        The spread of the posterior itself is not paid for in advance: the rate shows long before the last group is
        done, and what lacks is begun then.
        """
        return missing <= 0 or self.mean - deviations * math.sqrt(max(self.variance, 0.0)) >= missing - 0.5
