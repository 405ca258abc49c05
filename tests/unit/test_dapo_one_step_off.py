"""The order of the loop that samples one step ahead."""

from __future__ import annotations

import torch

from dapo_mcore.dapo import Run
from dapo_mcore.dapo_one_step_off import train
from dapo_mcore.rollout.collected import Collected
from dapo_mcore.types import TrainBatch


def one_response() -> TrainBatch:
    one = torch.ones(1)
    return TrainBatch(one.long(), one.long() * 0, one.long(), one.bool(), one, one)


def test_a_step_trains_while_the_next_one_is_sampled_with_the_weights_from_before_it():
    calls: list[str] = []
    trained = {"steps": 0}

    def finish(step: int, *_: object) -> None:
        trained["steps"] += 1

    def note(what: str, answer: object = None):
        def call(*arguments: object) -> object:
            calls.append(" ".join([what, *(str(argument) for argument in arguments if isinstance(argument, int))]))
            return answer

        return call

    run = Run(
        first_step=1,
        last_step=2,
        responses_per_update=lambda step: 1,
        push_weights=lambda: calls.append(f"push weights of {trained['steps']} steps"),
        collect_groups=note("collect", Collected((), ())),
        make_batch=lambda groups, step: one_response(),
        with_old_logprobs=lambda batch, step: batch,
        update=note("update", {}),
        finish_step=finish,
    )
    train(run, note("sample ahead"))
    assert calls == [
        *("push weights of 0 steps", "sample ahead 1"),
        *("collect 1", "push weights of 0 steps", "sample ahead 2", "update"),
        *("collect 2", "push weights of 1 steps", "sample ahead 3", "update"),
    ]
