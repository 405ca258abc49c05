"""DAPO: Algorithm 1 of arXiv:2503.14476. The comments give its line numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dapo_mcore.observe.metrics import Ratio
from dapo_mcore.rollout.collected import Collected
from dapo_mcore.types import Group, TrainBatch

Metrics = dict[str, Ratio]


@dataclass(frozen=True, slots=True)
class Run:
    """The finished parts of a run. Every rank calls each of them, in the order of the loop."""

    first_step: int
    last_step: int
    responses_per_update: Callable[[int], int]  # of a step

    push_weights: Callable[[], None]
    collect_groups: Callable[[int], Collected]
    make_batch: Callable[[Sequence[Group], int], TrainBatch]
    with_old_logprobs: Callable[[TrainBatch, int], TrainBatch]
    update: Callable[[TrainBatch], Metrics]
    finish_step: Callable[[int, Collected, list[Metrics]], None]


def train(run: Run) -> None:
    """Each step samples groups under the policy it starts with and makes one or more optimizer updates on them."""
    for step in range(run.first_step, run.last_step + 1):  # 1
        run.push_weights()  # 3: pi_old <- pi_theta
        collected = run.collect_groups(step)  # 2, 4-8
        batch = run.make_batch(collected.groups, step)  # 9
        batch = run.with_old_logprobs(batch, step)
        updates = [run.update(minibatch) for minibatch in batch.split(run.responses_per_update(step))]  # 10-11
        run.finish_step(step, collected, updates)
