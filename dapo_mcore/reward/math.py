r"""Verifier `math`: mathematical equality by math-verify (sympy), so `\frac12` is 0.5 and sets have no order.

math-verify's own time limits are off: they need SIGALRM, raise outside a main thread, and turn a time-out into "wrong".
The pool's deadline rules instead, which is why this module runs in the pool's worker processes only.

Percent: math-verify reads plain `10%` as 0.1 and LaTeX `10\%` as 10. Here a percentage equals its number and its
fraction however it is written, while two percentages are compared with each other.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import math_verify
from math_verify import ExprExtractionConfig, LatexExtractionConfig

from dapo_mcore.reward.answers import marked_answer, tail
from dapo_mcore.reward.magnitude import end_of_huge_number
from dapo_mcore.reward.verdicts import judged
from dapo_mcore.types import Verdict

MAX_ANSWER_CHARS = 1_000  # a longer final answer is wrong: no gold is that long, and sympy needs minutes

_PERCENT = re.compile(r"\s*\\?%")
_TARGETS = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

for _name in ("math_verify.parser", "math_verify.grader"):  # they warn that their time limits are off
    logging.getLogger(_name).setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True)
class Reading:
    """An answer as math-verify understands it: alternatives, of which the last may be plain text."""

    values: list[Any]
    text: str  # without percent sign
    is_percent: bool

    def hundredth(self) -> list[Any]:
        return _parse(rf"\boxed{{\frac{{{self.text}}}{{100}}}}")


def verify(response: str, answer: str, metadata: Mapping[str, Any]) -> Verdict:
    """Compares the marked answer, or without a mark what math-verify finds in the text, with `answer`.

    Raises:
        ValueError: `answer` itself is not an expression.
    """
    text = tail(response)
    marked = marked_answer(text)
    if marked is not None:
        return judged(is_same(answer, marked))
    gold, given = _read_gold(answer), _read_plain(text[end_of_huge_number(text) :])
    return judged(bool(given.values) and _equal(gold, given))


def is_same(answer: str, given: str) -> bool:
    """Whether `given`, an expression without its mark, has the value of `answer`; one of huge numbers never has.

    Raises:
        ValueError: `answer` is not an expression.
    """
    gold = _read_gold(answer)
    if len(given) > MAX_ANSWER_CHARS or end_of_huge_number(given):
        return False
    reading = _read(given)
    return bool(reading.values) and _equal(gold, reading)


def _read_gold(answer: str) -> Reading:
    gold = _read(answer)
    if not gold.values:
        raise ValueError(f"gold answer {answer!r} is not an expression that math-verify can read")
    return gold


def _read(answer: str) -> Reading:
    text, signs = _PERCENT.subn("", answer)
    return Reading(_parse(rf"\boxed{{{text}}}"), text, bool(signs))


def _read_plain(text: str) -> Reading:
    values = _parse(_PERCENT.sub("", text))
    found = next((value for value in reversed(values) if isinstance(value, str)), "")
    is_percent = re.search(re.escape(found) + r"\s*\$?\s*\\?%", text) is not None if found else False
    return Reading(values, found, is_percent)


def _equal(gold: Reading, given: Reading) -> bool:
    if _same(gold.values, given.values):
        return True
    if gold.is_percent == given.is_percent:
        return False
    return _same(gold.hundredth(), given.values) if gold.is_percent else _same(gold.values, given.hundredth())


def _parse(text: str) -> list[Any]:
    return math_verify.parse(text, _TARGETS, parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def _same(gold: list[Any], given: list[Any]) -> bool:
    return math_verify.verify(gold, given, timeout_seconds=None, raise_on_error=True)
