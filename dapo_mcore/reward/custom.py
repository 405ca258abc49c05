"""Verifier `package.module:function`: a user's own function

    def f(response: str, answer: str, metadata: Mapping[str, Any]) -> float | bool | dict[str, float]: ...

bool: right or wrong, score +1 or -1. Number in [-1, 1]: the score; accuracy is the number, or 0 where it is negative.
dict: {"score": any finite number, "acc": number in [0, 1]}; without "acc" the rule for numbers gives it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from dapo_mcore.reward.errors import VerifierError
from dapo_mcore.reward.verdicts import judged
from dapo_mcore.types import Verdict

_RETURN = "return a bool, a number in [-1, 1], or {'score': number, 'acc': number in [0, 1]}"


def load_function(spec: str) -> Callable[[str, str, Mapping[str, Any]], Verdict]:
    """The function that `spec` names, its return value made a Verdict.

    Raises:
        VerifierError: no such module or function, the module fails to import, or the thing is not callable.
    """
    module_name, _, name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise VerifierError(
            f"reward.verifier={spec}: cannot import {module_name} ({error}); correct the spelling, or put its folder "
            "on PYTHONPATH"
        ) from error
    function = getattr(module, name, None)
    if function is None:
        raise VerifierError(f"reward.verifier={spec}: {module.__file__} has no {name!r}; correct the spelling")
    if not callable(function):
        raise VerifierError(
            f"reward.verifier={spec}: not a function but of type {type(function).__name__}; name a function"
        )

    def verify(response: str, answer: str, metadata: Mapping[str, Any]) -> Verdict:
        return as_verdict(function(response, answer, metadata), spec)

    return verify


def as_verdict(value: object, spec: str) -> Verdict:
    """
    Raises:
        ValueError: `value` is nothing that a verifier may return.
    """
    if type(value).__name__ in ("bool", "bool_"):  # numpy's bool is no bool
        return judged(bool(value))
    if isinstance(value, Mapping) and value.keys() <= {"score", "acc"} and "score" in value:
        score = _number(value["score"], -math.inf, math.inf)
        accuracy = _number(value["acc"], 0, 1) if "acc" in value else _accuracy(value["score"])
    else:
        score, accuracy = _number(value, -1, 1), _accuracy(value)
    if score is None or accuracy is None:
        raise ValueError(f"reward.verifier={spec} returned {value!r:.200}: {_RETURN}")
    return Verdict(accuracy=accuracy, score=score)


def _accuracy(value: object) -> float | None:
    score = _number(value, -1, 1)
    return None if score is None else max(0.0, score)


def _number(value: object, low: float, high: float) -> float | None:
    """`value` as a float if it is a finite number in [low, high]."""
    if not isinstance(value, Real):
        return None
    number = float(value)
    return number if math.isfinite(number) and low <= number <= high else None
