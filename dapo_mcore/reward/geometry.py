r"""Verifiers `geometry` and `geometry_accuracy`: the last `\boxed{...}` of a response, compared as mathematics.

`geometry` pays 0.9 for a right answer and 0.1 for the form `<think>...</think> ... \boxed{...}`, as verl's geo3k reward
does. `geometry_accuracy` pays 1 for a right answer and nothing for the form. The accuracy of both is that of the answer
alone, so the group filter never sees the form. Like `math`, they need the pool's deadline.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dapo_mcore.reward.answers import last_boxed, tail
from dapo_mcore.reward.math import is_same
from dapo_mcore.types import Verdict

ACCURACY_SHARE, FORMAT_SHARE = 0.9, 0.1

_OPEN, _CLOSE, _BOX = "<think>", "</think>", r"\boxed{"


def verify(response: str, answer: str, metadata: Mapping[str, Any]) -> Verdict:
    """Score in {0, 0.1, 0.9, 1}.

    Raises:
        ValueError: `answer` itself is not an expression.
    """
    accuracy = _accuracy(response, answer)
    return Verdict(accuracy, ACCURACY_SHARE * accuracy + FORMAT_SHARE * has_format(response))


def verify_accuracy(response: str, answer: str, metadata: Mapping[str, Any]) -> Verdict:
    """Score in {0, 1}. Raises as `verify` does."""
    accuracy = _accuracy(response, answer)
    return Verdict(accuracy, accuracy)


def has_format(response: str) -> bool:
    r"""Whether `response` is `<think>.*</think>.*\boxed{.*}.*`, in linear time: a regular expression's may be cubic."""
    if not response.startswith(_OPEN):
        return False
    thought = response.find(_CLOSE, len(_OPEN))
    box = response.find(_BOX, thought + len(_CLOSE)) if thought >= 0 else -1
    return box >= 0 and response.find("}", box) >= 0


def _accuracy(response: str, answer: str) -> float:
    """Of what stands in the last box; one that is never closed, as in a truncated response, holds no answer."""
    text = tail(response)
    box = last_boxed(text[text.rfind(_BOX) :])
    return float(is_same(_plain(answer), _plain(box or "")))


def _plain(answer: str) -> str:
    """math-verify knows a degree by its LaTeX name alone."""
    return answer.replace("°", r"^\circ")
