"""Accuracy on held-out problems, with sampling parameters of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dapo_mcore.observe.metrics import Ratio
from dapo_mcore.rollout.engine import Decoder, Sampling
from dapo_mcore.rollout.grading import Grading
from dapo_mcore.rollout.groups import sample_groups
from dapo_mcore.types import FinishReason, Group, Outcome, Prompt

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
    """Samples `n` responses per problem and, if asked, one greedy response. Runs on rank 0.

    Problems of several data sets are measured together, as val/..., and each set apart, as val/<set>/...
    """

    engine: Decoder
    prompts: Sequence[Prompt]
    grader: Grading
    sampling: Sampling
    n: int
    greedy: bool
    seed: int

    def validate(self) -> Validation:
        groups = self._groups(self.n, self.sampling)
        greedy = Sampling(temperature=0.0, max_tokens=self.sampling.max_tokens)
        best = self._groups(1, greedy) if self.greedy else []
        metrics = validation_metrics("val", groups, best)
        sources = dict.fromkeys(prompt.source for prompt in self.prompts)
        for source in sources if len(sources) > 1 else ():
            metrics |= validation_metrics(f"val/{source}", _of(source, groups), _of(source, best))
        return Validation(metrics, tuple(groups))

    def _groups(self, n: int, sampling: Sampling) -> list[Group]:
        return sample_groups(
            self.engine, self.grader, self.prompts, sampling, n=n, seed=self.seed, version=VALIDATION_VERSION
        )


def _of(source: str, groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if group.prompt.source == source]


def validation_metrics(prefix: str, groups: Sequence[Group], best: Sequence[Group]) -> dict[str, Ratio]:
    """Of some problems: their sampled groups, and a greedy response to each unless that was not asked for."""
    metrics = accuracy_metrics(groups) | response_metrics(groups)
    if best:
        metrics["accuracy_greedy"] = Ratio(sum(g.accuracies[0] for g in best), len(best))
    return {f"{prefix}/{name}": ratio for name, ratio in metrics.items()}


def accuracy_metrics(groups: Sequence[Group]) -> dict[str, Ratio]:
    """accuracy (= mean@n) and pass@k for k = 2, 4, ... n, over all problems. What could not be graded is wrong."""
    n = len(groups[0].samples)
    mean = Ratio(sum(sum(g.accuracies) for g in groups), n * len(groups))
    ks = [1 << e for e in range(1, n.bit_length()) if 1 << e <= n]
    passes = {
        f"pass@{k}": Ratio(sum(pass_at_k(n, sum(a >= 1.0 for a in g.accuracies), k) for g in groups), len(groups))
        for k in ks
    }
    return {"accuracy": mean, f"mean@{n}": mean} | passes


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased chance that one of k responses is right, from n of which `correct` are (arXiv:2107.03374, eq. 1)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def response_metrics(groups: Sequence[Group]) -> dict[str, Ratio]:
    samples = [sample for group in groups for sample in group.samples]
    responses = [sample.response for sample in samples]
    return {
        "response_length": Ratio(sum(len(r.token_ids) for r in responses), len(responses)),
        "truncated": Ratio(sum(r.finish_reason is FinishReason.LENGTH for r in responses), len(responses)),
        "ungraded": Ratio(sum(s.verdict.outcome is not Outcome.GRADED for s in samples), len(samples)),
    }
