"""What each rank does for test_leader."""

from __future__ import annotations

import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from dapo_mcore.rollout.leader import lead

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
