"""DAPO with one step of overlap: the groups of the next step are sampled while this one trains.

Batch k is sampled with the weights that k - 2 training steps have made, where Algorithm 1 has those of k - 1: its
staleness is 1. The first batch of a run, or of a resumed one, is sampled with the weights it finds: its staleness is 0.
The clip is relative to the policy that the step begins with (old log-probabilities are recomputed); the engine's are
those of the behaviour policy, and actor.rollout_correction weighs the tokens by the ratio of both.
"""

from __future__ import annotations

from collections.abc import Callable

from dapo_mcore.dapo import Run


def train(run: Run, sample_ahead: Callable[[int], None]) -> None:
    """`sample_ahead` begins with the groups of a step, which `run.collect_groups` waits for."""
    run.push_weights()
    sample_ahead(run.first_step)
    for step in range(run.first_step, run.last_step + 1):  # 1
        collected = run.collect_groups(step)  # 2, 4-8
        run.push_weights()  # 3, for the next step: what it samples, it samples before this one's updates
        sample_ahead(step + 1)
        batch = run.make_batch(collected.groups, step)  # 9
        batch = run.with_old_logprobs(batch, step)
        updates = [run.update(minibatch) for minibatch in batch.split(run.responses_per_update(step))]  # 10-11
        run.finish_step(step, collected, updates)
