"""What sampling hands to a training step, and its metrics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from dapo_mcore.algo.metrics import filter_metrics, response_metrics, reward_metrics
from dapo_mcore.observe.metrics import Ratio
from dapo_mcore.types import Group


@dataclass(frozen=True, slots=True)
class Collected:
    """What one step trains on, and what was sampled on the way to it: the latter on rank 0 alone, which counts it."""

    groups: tuple[Group, ...]  # committed: passing, in prompt order
    considered: tuple[Group, ...]  # all up to the last committed one: what sequential sampling would have drawn
    # sampler/: what running ahead took, and time/: both depend on how fast things went, unlike everything else
    effort: dict[str, Ratio] = field(default_factory=dict)
    settings: dict[str, Ratio] = field(default_factory=dict)  # what a schedule changes over the run

    def trained(self) -> Collected:
        """What the other ranks need of it; of hard data `considered` is ten times that."""
        return replace(self, considered=())

    def metrics(self) -> dict[str, Ratio]:
        return {
            **reward_metrics(self.considered),
            **filter_metrics(self.considered),
            **response_metrics(self.groups),
            "rollout/groups_sampled": Ratio(len(self.considered), 1),
            "rollout/groups_trained": Ratio(len(self.groups), 1),
            "rollout/sampled_per_trained_token": Ratio(tokens_of(self.considered), tokens_of(self.groups)),
            **self.settings,
            **self.effort,
        }


def tokens_of(groups: Iterable[Group]) -> int:
    """Response tokens."""
    return sum(len(sample.response.token_ids) for group in groups for sample in group.samples)
