"""Accuracy on held-out problems, with sampling parameters of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dapo_mcore.observe.metrics import Ratio
from dapo_mcore.rollout.engine import Decoder, Sampling
from dapo_mcore.rollout.grading import Grading
from dapo_mcore.rollout.groups import sample_groups
from dapo_mcore.types import FinishReason, Group, Prompt

VALIDATION_VERSION = -1  # the same random numbers at every validation, none of which training uses


@dataclass(frozen=True, slots=True)
class Validation:
    metrics: dict[str, Ratio]
    groups: tuple[Group, ...]  # the sampled responses, for people to read; on rank 0

    def without_groups(self) -> Validation:
        """What the other ranks need of it: they write nothing."""
        return replace(self, groups=())


@dataclass(slots=True)
class Validator:
    """Samples `n` responses per problem and, if asked, one greedy response. Runs on rank 0."""

    engine: Decoder
    prompts: Sequence[Prompt]
    grader: Grading
    sampling: Sampling
    n: int
    greedy: bool
    seed: int

    def validate(self) -> Validation:
        groups = self._groups(self.n, self.sampling)
        metrics = accuracy_metrics(groups) | length_metrics(groups)
        if self.greedy:
            best = self._groups(1, Sampling(temperature=0.0, max_tokens=self.sampling.max_tokens))
            metrics["val/accuracy_greedy"] = Ratio(sum(g.accuracies[0] for g in best), len(best))
        return Validation(metrics, tuple(groups))

    def _groups(self, n: int, sampling: Sampling) -> list[Group]:
        return sample_groups(
            self.engine, self.grader, self.prompts, sampling, n=n, seed=self.seed, version=VALIDATION_VERSION
        )


def accuracy_metrics(groups: Sequence[Group]) -> dict[str, Ratio]:
    """val/accuracy (= mean@n) and pass@k for k = 2, 4, ... n, over all problems."""
    n = len(groups[0].samples)
    mean = Ratio(sum(sum(g.accuracies) for g in groups), n * len(groups))
    ks = [1 << e for e in range(1, n.bit_length()) if 1 << e <= n]
    passes = {
        f"val/pass@{k}": Ratio(sum(pass_at_k(n, sum(a >= 1.0 for a in g.accuracies), k) for g in groups), len(groups))
        for k in ks
    }
    return {"val/accuracy": mean, f"val/mean@{n}": mean} | passes


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased chance that one of k responses is right, from n of which `correct` are (arXiv:2107.03374, eq. 1)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def length_metrics(groups: Sequence[Group]) -> dict[str, Ratio]:
    responses = [s.response for g in groups for s in g.samples]
    return {
        "val/response_length": Ratio(sum(len(r.token_ids) for r in responses), len(responses)),
        "val/truncated": Ratio(sum(r.finish_reason is FinishReason.LENGTH for r in responses), len(responses)),
    }
