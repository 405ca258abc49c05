"""Prompts in, graded groups out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dapo_mcore.rollout.engine import RolloutEngine, Sampling, requests_for
from dapo_mcore.types import Group, Prompt, Response, Sample, Verdict


class Grading(Protocol):
    def grade(self, items: Sequence[tuple[Prompt, Response]]) -> list[Verdict]: ...


def sample_groups(
    engine: RolloutEngine,
    grader: Grading,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    n: int,
    seed: int,
    version: int,
) -> list[Group]:
    """One group of `n` graded responses per prompt, in the order of `prompts`."""
    requests = requests_for(prompts, n, seed, version)
    responses = engine.generate(requests, sampling)
    verdicts = grader.grade([(q.prompt, r) for q, r in zip(requests, responses, strict=True)])
    samples = [Sample(r, v) for r, v in zip(responses, verdicts, strict=True)]
    return [Group(prompt, tuple(samples[i * n : (i + 1) * n])) for i, prompt in enumerate(prompts)]
