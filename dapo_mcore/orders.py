"""The order of sampling and training, as a loop and as the rest of a run sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from dapo_mcore import dapo, dapo_one_step_off
from dapo_mcore.config import Loop, RunConfig
from dapo_mcore.dapo import Run
from dapo_mcore.desk import Desk
from dapo_mcore.rollout.ahead import SamplingAhead
from dapo_mcore.rollout.collected import Collected
from dapo_mcore.rollout.engine import RolloutEngine
from dapo_mcore.rollout.leader import lead
from dapo_mcore.turns import Turns


@dataclass(frozen=True, slots=True)
class Order:
    """When a loop samples, as seen from its other parts."""

    train: Callable[[Run], None]
    collect_groups: Callable[[int], Collected]
    end_sampling: Callable[[], None]  # until nothing is sampled: the engine is the caller's
    make_room: Callable[[], None]  # on the device, for the engine's weights
    run_state: Callable[[], Mapping[str, Any]]  # of rank 0; empty elsewhere


def _in_turn(config: RunConfig, engine: RolloutEngine, desk: Desk | None, turns: Turns) -> Order:
    """Sampling and training alternate."""

    def collect(step: int) -> Collected:
        return lead(desk and desk.driver(engine, step).collect, engine, Collected.trained)

    return Order(
        train=dapo.train,
        collect_groups=turns.of_engine(collect),
        end_sampling=_nothing,
        make_room=turns.policy.rest,
        run_state=desk.state if desk else dict,
    )


def _one_step_off(config: RunConfig, engine: RolloutEngine, desk: Desk | None, turns: Turns) -> Order:
    """A step's groups are sampled during the step before."""
    ahead = SamplingAhead(
        engine,
        config.trainer.total_training_steps,
        collect=lambda step: cast(Desk, desk).driver(engine, step).collect(),
        run_state=lambda: cast(Desk, desk).state(),
    )
    return Order(
        train=partial(dapo_one_step_off.train, sample_ahead=ahead.start),
        collect_groups=lambda _: ahead.take(),
        end_sampling=ahead.wait,
        make_room=_nothing,  # its engines have devices of their own
        run_state=ahead.state,
    )


def _nothing() -> None:
    pass


ORDERS = {Loop.dapo: _in_turn, Loop.one_step_off: _one_step_off}
