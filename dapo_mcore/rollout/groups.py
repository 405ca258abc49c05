"""Prompts in, graded groups out, all at once."""

from __future__ import annotations

from collections.abc import Sequence

from dapo_mcore.rollout.engine import Decoder, Sampling, generate, requests_for
from dapo_mcore.rollout.grading import Grading
from dapo_mcore.types import Group, Prompt, Sample


def sample_groups(
    engine: Decoder,
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
    responses = generate(engine, requests, sampling)
    verdicts = grader.grade([(q.prompt, r) for q, r in zip(requests, responses, strict=True)])
    samples = [Sample(r, v) for r, v in zip(responses, verdicts, strict=True)]
    return [Group(prompt, tuple(samples[i * n : (i + 1) * n])) for i, prompt in enumerate(prompts)]
