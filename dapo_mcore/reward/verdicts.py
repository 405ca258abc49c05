"""Verdicts with DAPO's task reward, eq. 7: +1 for a right answer, -1 for a wrong one."""

from __future__ import annotations

from dapo_mcore.types import Outcome, Verdict

RIGHT = Verdict(accuracy=1.0, score=1.0)
WRONG = Verdict(accuracy=0.0, score=-1.0)


def judged(is_right: bool) -> Verdict:
    return RIGHT if is_right else WRONG


def failed(outcome: Outcome, detail: str) -> Verdict:
    """Not graded. Where a reader ignores the outcome, breaking the verifier must not pay more than a wrong answer."""
    return Verdict(accuracy=0.0, score=-1.0, outcome=outcome, detail=detail)
