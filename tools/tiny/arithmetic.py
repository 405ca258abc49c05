"""Sums of 4 or 5 single digits (reasoning-gym `chain_sum`), worked solutions, and disjoint sets of problems.

A policy that shows the work is right far more often than one that answers at once:

    question  State the final answer to the following arithmetic problem: 6 - 3 + 8 - 3 =
    worked    6 - 3 = 3; 3 + 8 = 11; 11 - 3 = 8; <answer>8</answer>
    bare      <answer>8</answer>
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import reasoning_gym

TASK = "chain_sum"
OPTIONS = {"min_terms": 4, "max_terms": 5, "min_digits": 1, "max_digits": 1}
# Problem i of a set is drawn from seed + i: sets must lie further apart than they are long.
RUN_STRIDE = 1_000_000


@dataclass(frozen=True, slots=True)
class ProblemSet:
    seed: int
    size: int

    def draw(self) -> list[dict[str, Any]]:
        task = reasoning_gym.create_dataset(TASK, seed=self.seed, size=self.size, **OPTIONS)
        return [task[i] for i in range(self.size)]


VALIDATION = ProblemSet(seed=10_000_000, size=256)  # the same for every run


def training_set(seed: int) -> ProblemSet:
    return ProblemSet(seed=20_000_000 + seed * RUN_STRIDE, size=6_000)


def warm_start_set(seed: int) -> ProblemSet:
    return ProblemSet(seed=60_000_000 + seed * RUN_STRIDE, size=20_000)


def unseen(problems: Collection[dict[str, Any]], *seen: Collection[dict[str, Any]]) -> list[dict[str, Any]]:
    """The problems, each once, without the questions of `seen`."""
    taken = {problem["question"] for others in seen for problem in others}
    return list({problem["question"]: problem for problem in problems if problem["question"] not in taken}.values())


def worked(problem: dict[str, Any]) -> str:
    """The sum term by term, then the answer."""
    first, *rest = problem["metadata"]["expression"].split()
    total, steps = int(first), ""
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        before, total = total, total + int(term) if sign == "+" else total - int(term)
        steps += f"{before} {sign} {term} = {total}; "
    return steps + answered(total)


def bare(problem: dict[str, Any]) -> str:
    return answered(problem["answer"])


def answered(answer: object) -> str:
    return f"<answer>{answer}</answer>"
