"""A run's process: what it has in memory is gone when it crashes, the state it saved is not."""

from __future__ import annotations

import json
import random
from typing import Any

from hypothesis import strategies as st

from dapo_mcore.algo.groups import every_group, passes_filter
from dapo_mcore.config import OnExhausted
from dapo_mcore.rollout.bank import Bank
from dapo_mcore.rollout.collected import Collected
from dapo_mcore.rollout.driver import Driver
from dapo_mcore.rollout.engine import Sampling
from dapo_mcore.rollout.pass_rate import ELDEST, UNSEEN, PassRate
from tests.unit.rollout.hostile import Crash, HostileEngine, HostileGrader, Stream, World

RUN_SEED = 11

worlds = st.builds(World, number=st.integers(0, 10_000), hardness=st.sampled_from([0.0, 0.3, 0.7, 0.95]))
plans = st.fixed_dictionaries(
    {
        "wanted": st.integers(1, 7),
        "n": st.integers(2, 5),
        "budget": st.sampled_from([4, 9, 40]),
        "max_samples": st.sampled_from([0, 0, 6, 8]),
        "filters": st.sampled_from([True, True, True, False]),
        "on_exhausted": st.sampled_from(OnExhausted),
        "staleness": st.just(0),
        "hope": st.sampled_from([0, 10_000]),  # passing groups that were not there: the driver thinks few are enough
    }
)
stale_plans = st.builds(lambda plan, staleness: plan | {"staleness": staleness}, plans, st.integers(1, 2))


class Machine:
    def __init__(self, world: World, schedule: int, plan: dict[str, Any], polls_to_live: int = 1 << 30) -> None:
        self.world, self.schedule, self.plan = world, schedule, plan
        draw = random.Random(schedule)
        self.stream = Stream(world)
        self.engine = HostileEngine(world, draw, draw.choice([2, 5, 16, 1000]), polls_to_live)
        self.grader = HostileGrader(draw)
        hope = plan["hope"]
        self.pass_rate = PassRate({UNSEEN: hope}, {UNSEEN: hope / 30}, revealed={ELDEST: hope})
        self.bank = Bank(plan["staleness"])

    @property
    def passes(self):
        return passes_filter if self.plan["filters"] else every_group

    def collect(self, step: int) -> Collected:
        self.engine.load((), step)
        return Driver(
            self.engine,
            self.stream,
            self.grader,
            Sampling(temperature=1.0, max_tokens=8),
            group_size=self.plan["n"],
            seed=RUN_SEED,
            wanted=self.plan["wanted"],
            budget=self.plan["budget"],
            on_exhausted=self.plan["on_exhausted"],
            passes=self.passes,
            max_samples=self.plan["max_samples"],
            pass_rate=self.pass_rate,
            bank=self.bank,
        ).collect()

    def state(self) -> str:
        parts = {"position": self.stream.position, "pass_rate": self.pass_rate.state(), "bank": self.bank.state()}
        return json.dumps(parts)

    def resumed(self, state: str) -> Machine:
        """Another process, with another fate, that goes on from there."""
        machine, parts = Machine(self.world, self.schedule + 1, self.plan), json.loads(state)
        machine.stream.position = parts["position"]
        machine.pass_rate.load_state(parts["pass_rate"])
        machine.bank.load_state(parts["bank"])
        return machine


def survived(machine: Machine, step: int) -> tuple[Machine, Collected]:
    """The groups of a step, by another process if this one dies; and the process that lives."""
    state = machine.state()
    try:
        return machine, machine.collect(step)
    except Crash:
        successor = machine.resumed(state)
        return successor, successor.collect(step)
