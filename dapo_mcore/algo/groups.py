"""Dynamic sampling's two decisions: which groups pass, and which of them a step may commit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dapo_mcore.types import Group, Outcome


def is_mixed(accuracies: Sequence[float], tolerance: float = 1e-6) -> bool:
    """Whether a group's raw accuracies differ; with 0 and 1 alone this is 0 < number correct < G of eq. 11.

    Compares the extremes: the standard deviation of equal floats such as 0.1 is often above 0.
    """
    return len(accuracies) > 1 and max(accuracies) - min(accuracies) > tolerance


def graded_accuracies(group: Group) -> list[float]:
    """Raw accuracies of the responses that could be graded: a verifier's failure is not a wrong answer."""
    return [s.verdict.accuracy for s in group.samples if s.verdict.outcome is Outcome.GRADED]


def passes_filter(group: Group) -> bool:
    """Whether the group carries a learning signal, eq. 11, judged by the responses that could be graded."""
    return is_mixed(graded_accuracies(group))


def every_group(group: Group) -> bool:
    """The filter of plain GRPO (algorithm.filter_groups.enable=false)."""
    return True


class Commit(NamedTuple):
    accepted: list[int]  # positions in the prompt stream, ascending
    cursor: int  # first position that stays unread


def commit_in_order(verdicts: Mapping[int, bool], cursor: int, wanted: int) -> Commit:
    """Read decided prompts one by one from `cursor`, as sequential sampling would, until `wanted` have passed.

    `verdicts` maps a position in the prompt stream to whether its group passed; missing: not decided yet. Nothing
    behind an undecided prompt is committed, so that which groups train does not depend on which finished first.
    """
    accepted: list[int] = []
    while len(accepted) < wanted and cursor in verdicts:
        if verdicts[cursor]:
            accepted.append(cursor)
        cursor += 1
    return Commit(accepted, cursor)
