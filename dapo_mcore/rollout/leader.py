"""Rank 0 decides, every rank learns the decision: results and errors travel alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch.distributed as dist

from dapo_mcore.rollout.engine import RolloutEngine
from dapo_mcore.rollout.ranks import RolloutError, patient_group

Decision = TypeVar("Decision")


class StopRun(Exception):
    """The run ends early by its own rules; the message says why. No failure: what was trained is kept."""


class LeaderError(RuntimeError):
    """Raised on the other ranks when rank 0's decision failed; rank 0 itself reports the cause."""


def is_leader() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _whole(decision: Decision) -> Decision:
    return decision


def lead(
    decide: Callable[[], Decision] | None,
    engine: RolloutEngine | None = None,
    share: Callable[[Decision], Decision] = _whole,
) -> Decision:
    """What `decide` returns on rank 0, on every rank; the other ranks serve `engine` meanwhile. Collective.

    Only rank 0's `decide` is called; the other ranks may have none. It may take as long as it likes. `share` makes
    what the other ranks get of its result.

    Raises:
        StopRun: on every rank, when `decide` raised it.
        RolloutError: on every rank, when sampling failed on any.
        LeaderError: on the other ranks, when `decide` raised anything else on rank 0, where it goes on its way.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        assert decide is not None
        return decide()
    group = _group_of(dist.group.WORLD)  # made before anybody waits
    if not is_leader():
        if engine is not None:
            engine.follow()
        return _receive(group)
    assert decide is not None
    try:
        decision = decide()
    except RolloutError:  # raised on every rank by the engine itself
        raise
    except BaseException as error:
        _end_service(engine)
        told = error if isinstance(error, StopRun) else LeaderError(f"{type(error).__name__}: {error}")
        _broadcast((None, told), group)
        raise
    _end_service(engine)
    _broadcast((share(decision), None), group)
    return decision


@cache
def _group_of(world: object) -> dist.ProcessGroup:
    """One group for all that is led in a torch.distributed world. Collective."""
    return patient_group()


def _end_service(engine: RolloutEngine | None) -> None:
    if engine is not None:
        engine.release()


def _receive(group: dist.ProcessGroup) -> Decision:  # type: ignore[type-var]
    decision, error = _broadcast((None, None), group)
    if error is not None:
        raise error
    return decision


def _broadcast(
    outcome: tuple[Decision | None, Exception | None], group: dist.ProcessGroup
) -> tuple[Decision, Exception | None]:
    box = [outcome]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]  # type: ignore[return-value]
