"""Dynamic sampling as plainly as it can be written: whole rounds, each waited for. What the driver is measured against.

It commits the first `wanted` passing groups in prompt order, as `dapo_mcore.rollout.driver` does, and consumes the
prompts up to the last of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dapo_mcore.algo.groups import commit_in_order, passes_filter
from dapo_mcore.rollout.driver import PromptStream
from dapo_mcore.rollout.engine import RolloutEngine, Sampling
from dapo_mcore.rollout.grading import Grading
from dapo_mcore.rollout.groups import sample_groups
from dapo_mcore.types import Group

SPECULATION = 1.3  # prompts of a round per group that is missing


@dataclass(frozen=True, slots=True)
class Rounds:
    engine: RolloutEngine
    prompts: PromptStream
    grader: Grading
    sampling: Sampling
    group_size: int
    seed: int
    wanted: int

    def collect(self) -> tuple[list[Group], list[Group]]:
        """The groups that train, and all that were sampled. Goes on for as long as it takes."""
        start = self.prompts.position
        sampled: list[Group] = []
        while True:
            verdicts = {start + i: passes_filter(group) for i, group in enumerate(sampled)}
            commit = commit_in_order(verdicts, start, self.wanted)
            missing = self.wanted - len(commit.accepted)
            if not missing:
                self.prompts.commit(commit.cursor)
                return [sampled[position - start] for position in commit.accepted], sampled
            prompts = self.prompts.peek(start + len(sampled), math.ceil(missing * SPECULATION))
            sampled += sample_groups(
                self.engine,
                self.grader,
                prompts,
                self.sampling,
                n=self.group_size,
                seed=self.seed,
                version=self.engine.version,
            )
