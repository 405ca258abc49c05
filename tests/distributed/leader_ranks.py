"""What each rank does for test_leader."""

from __future__ import annotations

import time
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from dapo_mcore.config import Loop, RunConfig, TrainerConfig
from dapo_mcore.orders import ORDERS
from dapo_mcore.rollout.collected import Collected
from dapo_mcore.rollout.leader import is_leader, lead
from dapo_mcore.turns import Turns

SHORT, LONGER_S, LONG = timedelta(milliseconds=200), 2.0, timedelta(minutes=5)


def wait_longer_than_the_world_does() -> tuple[str, str]:
    """What rank 0 decides after more than the time limit of the world's own group, and what such a group says then."""
    doomed = dist.new_group()  # a group that has waited in vain is of no use afterwards
    _set_pg_timeout(SHORT, doomed)
    lead(lambda: None)  # the ranks are there
    _set_pg_timeout(SHORT, dist.group.WORLD)
    decision = lead(_slowly)
    _set_pg_timeout(LONG, dist.group.WORLD)
    said = ""
    if dist.get_rank() == 1:
        try:
            dist.broadcast(torch.zeros(1), src=0, group=doomed)
        except RuntimeError as error:
            said = str(error)
    return decision, said


def _slowly() -> str:
    time.sleep(LONGER_S)
    return "decided"


class Engine:
    """Nothing is asked of it."""

    def follow(self) -> None: ...

    def release(self) -> None: ...

    def wake(self) -> None: ...

    def sleep(self) -> None: ...


def collected_by_every_loop(sampled: Collected) -> dict[str, Collected]:
    """What a step of each loop gets on this rank when `sampled` is what rank 0 collects."""
    config = RunConfig(trainer=TrainerConfig(total_training_steps=1))
    desk: Any = SimpleNamespace(driver=lambda engine, step: SimpleNamespace(collect=lambda: sampled), state=dict)
    engine: Any = Engine()
    turns = Turns(SimpleNamespace(on_host=nullcontext, rest=lambda: None), engine)
    found = {}
    for loop in Loop:
        order = ORDERS[loop](config, engine, desk if is_leader() else None, turns)
        run: Any = SimpleNamespace(
            first_step=1,
            last_step=1,
            push_weights=lambda: None,
            collect_groups=order.collect_groups,
            make_batch=lambda groups, step: SimpleNamespace(split=lambda count: []),
            with_old_logprobs=lambda batch, step: batch,
            responses_per_update=lambda step: 1,
            finish_step=lambda step, collected, updates: found.update({loop.name: collected}),  # noqa: B023
        )
        order.train(run)
    return found
