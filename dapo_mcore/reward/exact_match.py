"""Verifier `exact_match`: the final answer equals the gold, character for character after normalisation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dapo_mcore.reward.answers import marked_answer, tail
from dapo_mcore.reward.verdicts import judged
from dapo_mcore.types import Verdict

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def normalise(answer: str) -> str:
    """Case, runs of white space, thousands commas, dollar signs around and a full stop at the end do not matter."""
    answer = " ".join(answer.casefold().split()).removesuffix(".").strip("$ ")
    return _THOUSANDS.sub("", answer)


def verify(response: str, answer: str, metadata: Mapping[str, Any]) -> Verdict:
    """Compares the marked answer, or without a mark the last line that is not blank, with `answer`."""
    text = tail(response)
    given = marked_answer(text)
    if given is None:
        given = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    return judged(bool(given.strip()) and normalise(given) == normalise(answer))
