"""Known answers that a verifier must judge rightly before it judges anything else.

A verifier that fails on every answer looks like a policy that is always wrong (verl #3407 trained on such zeros).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dapo_mcore.types import Outcome, Prompt, Verdict

MAX_PROMPTS = 8
GARBAGE = "zyx, no such answer, xyz"


@dataclass(frozen=True, slots=True)
class Probe:
    """One thing to grade, and what is known about it."""

    response: str
    answer: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    is_right: bool | None = None  # None: nothing is known, it must only be graded
    is_gold: bool = False  # made from the data's own answer, which a verifier may be unable to read now and then


_GEOMETRY = (
    Probe(r"<think>a right angle</think> It is \boxed{2 \sqrt{2}}.", r"2 \sqrt { 2 }", is_right=True),
    Probe(r"\boxed{30^\circ}", "30", is_right=True),
    Probe("<think>a right angle</think> 42", "42", is_right=False),
    Probe(r"<think>a guess</think> \boxed{41}", "42", is_right=False),
    Probe("", "42", is_right=False),
)
_FIXED = {
    "geometry": _GEOMETRY,
    "geometry_accuracy": _GEOMETRY,
    "math": (
        Probe(r"So the result is \boxed{\frac{1}{2}}.", "0.5", is_right=True),
        Probe(r"The answer is 1,234", "1234", is_right=True),
        Probe(r"\boxed{(x+1)^2}", "x^2 + 2x + 1", is_right=True),
        Probe(r"\boxed{41}", "42", is_right=False),
        Probe(GARBAGE, "42", is_right=False),
        Probe("", "42", is_right=False),
    ),
    "exact_match": (
        Probe("It is <answer> Red </answer>", "red", is_right=True),
        Probe("blue", "red", is_right=False),
        Probe("", "red", is_right=False),
    ),
}
_BOX, _TAG = r"\boxed{%s}", "<answer>%s</answer>"
_FORMATS = {
    "math": _BOX,
    "geometry": _BOX,
    "geometry_accuracy": _BOX,
    "exact_match": _TAG,
    "reasoning_gym": _TAG,
}


def probes_for(verifier: str, prompts: Sequence[Prompt]) -> list[Probe]:
    """Fixed probes of the verifier, then for some prompts their own answer and, for built-in verifiers, garbage."""
    written = _FORMATS.get(verifier, "%s")
    some = [prompt for prompt in prompts[:MAX_PROMPTS] if prompt.answer]
    right = True if verifier in _FORMATS else None
    gold = [Probe(written.replace("%s", p.answer), p.answer, p.metadata, right, is_gold=True) for p in some]
    garbage = [Probe(written.replace("%s", GARBAGE), p.answer, p.metadata, False) for p in prompts[:MAX_PROMPTS]]
    return [*_FIXED.get(verifier, ()), *gold, *(garbage if verifier in _FORMATS else ())]


def refusal(probes: Sequence[Probe], verdicts: Sequence[Verdict]) -> str:
    """Why the verifier cannot be used; empty if it can."""
    gold = []
    for probe, verdict in zip(probes, verdicts, strict=True):
        told = f"self-test: {probe.response!r:.200} against {probe.answer!r:.80}"
        if probe.is_gold:
            gold.append((probe, verdict))
        elif verdict.outcome is not Outcome.GRADED:
            return f"{told} got no verdict: {verdict.detail}"
        elif not _agrees(probe, verdict):
            return f"{told} was judged {'wrong' if probe.is_right else 'right'}, but is not"
    return _gold_refusal(gold)


def _gold_refusal(gold: Sequence[tuple[Probe, Verdict]]) -> str:
    """An odd gold answer is the data's business; if none passes, the answers are not what the verifier reads."""
    if not gold or any(_agrees(probe, verdict) for probe, verdict in gold):
        return ""
    probe, verdict = gold[0]
    return (
        f"self-test: none of {len(gold)} gold answers of the data passes; the first is {probe.answer!r:.200}, "
        f"{verdict.detail or f'accuracy {verdict.accuracy:g}'}; check data.train.answer_key and "
        "data.train.answer_pattern, or choose another verifier"
    )


def _agrees(probe: Probe, verdict: Verdict) -> bool:
    is_graded = verdict.outcome is Outcome.GRADED
    return is_graded and (probe.is_right is None or (verdict.accuracy == 1.0) == probe.is_right)
