"""What a set of groups looks like. Every metric is a total and a count, divided where it is written."""

from __future__ import annotations

from collections.abc import Sequence

from dapo_mcore.algo.groups import graded_accuracies, passes_filter
from dapo_mcore.observe.metrics import Ratio
from dapo_mcore.types import FinishReason, Group, Outcome


def mean_of(values: Sequence[float]) -> Ratio:
    return Ratio(sum(values), len(values))


def reward_metrics(groups: Sequence[Group]) -> dict[str, Ratio]:
    """Raw accuracy and unshaped score over graded responses; numbers of responses that could not be graded."""
    verdicts = [sample.verdict for group in groups for sample in group.samples]
    graded = [verdict for verdict in verdicts if verdict.outcome is Outcome.GRADED]
    return {
        "reward/accuracy": mean_of([verdict.accuracy for verdict in graded]),
        "reward/score": mean_of([verdict.score for verdict in graded]),
        "reward/timeouts": Ratio(sum(verdict.outcome is Outcome.TIMEOUT for verdict in verdicts), 1),
        "reward/errors": Ratio(sum(verdict.outcome is Outcome.ERROR for verdict in verdicts), 1),
    }


def response_metrics(groups: Sequence[Group]) -> dict[str, Ratio]:
    """Lengths in tokens, of pictures too, and the share of responses cut at max_response_length."""
    responses = [sample.response for group in groups for sample in group.samples]
    lengths = [len(response.token_ids) for response in responses]
    return {
        "rollout/prompt_length": mean_of([group.prompt.length for group in groups]),
        "rollout/response_length": mean_of(lengths),
        "rollout/response_length_min": Ratio(min(lengths, default=0), 1),
        "rollout/response_length_max": Ratio(max(lengths, default=0), 1),
        "rollout/truncated_fraction": mean_of([r.finish_reason is FinishReason.LENGTH for r in responses]),
    }


def filter_metrics(groups: Sequence[Group]) -> dict[str, Ratio]:
    """Shares of all *sampled* groups: useful, solved (every response right), stuck (every response wrong)."""
    return {
        "rollout/pass_rate": mean_of([passes_filter(group) for group in groups]),
        "rollout/all_right_fraction": mean_of([min(graded_accuracies(group), default=0) >= 1 for group in groups]),
        "rollout/all_wrong_fraction": mean_of([max(graded_accuracies(group), default=1) <= 0 for group in groups]),
    }
