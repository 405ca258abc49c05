"""Runs a strategy for some steps and says what they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from dapo_mcore.rollout.driver import Driver
from dapo_mcore.rollout.engine import Sampling
from dapo_mcore.types import Prompt
from tools.simulation.engine import Clock, Cost, SimulatedEngine
from tools.simulation.grader import SimulatedGrader
from tools.simulation.peers import PEERS, Groups, Strategy
from tools.simulation.workload import Workload

WARM_UP = 1  # steps that are not measured: what a strategy has learnt about the pass rate is not that of its first step
BUDGET = 100  # prompts per group wanted: no step of the driver ends for want of more


Lengths = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Setting:
    workload: Workload
    wanted: int  # groups per step
    engines: int
    cost: Cost
    steps: int  # measured


@dataclass(frozen=True, slots=True)
class Figures:
    """Over the measured steps of one strategy. The times are of the rollout alone: no training, no weight transfer."""

    strategy: str
    pass_rate: float
    engines: int
    generated_per_trained: float  # tokens of everything sampled, aborted responses included, per committed token
    step_time_s: float  # virtual seconds from the first request of a step until its batch is determined, mean
    length_bias: float  # see `length_bias`
    length_bias_error: float


OURS = "in_order"
STRATEGIES = (OURS, *PEERS)

Collect = Callable[[], list[int]]  # one step: uids of the committed groups


@dataclass(slots=True)
class Stream:
    """Prompts that never come twice."""

    workload: Workload
    position: int = 0

    def peek(self, start: int, count: int) -> list[Prompt]:
        return [self.workload.prompt(uid) for uid in range(start, start + count)]

    def commit(self, position: int) -> None:
        self.position = position


@dataclass(slots=True)
class Bench:
    """Fresh engines, grader and clock."""

    setting: Setting
    clock: Clock
    engine: SimulatedEngine
    grader: SimulatedGrader
    sampling: Sampling

    @classmethod
    def of(cls, setting: Setting) -> Bench:
        clock = Clock()
        engine = SimulatedEngine(setting.workload, setting.engines, setting.cost, clock)
        sampling = Sampling(temperature=1.0, max_tokens=setting.workload.max_tokens)
        return cls(setting, clock, engine, SimulatedGrader(clock), sampling)

    def strategy(self, name: str) -> Collect:
        return self._driver() if name == OURS else self._peer(PEERS[name])

    def _driver(self) -> Collect:
        """The driver of a run, as it is."""
        workload = self.setting.workload
        driver = Driver(
            self.engine,
            Stream(workload),
            self.grader,
            self.sampling,
            group_size=workload.group_size,
            seed=workload.seed,
            wanted=self.setting.wanted,
            budget=BUDGET * self.setting.wanted,
            clock=lambda: self.clock.now,
        )
        return lambda: [group.prompt.uid for group in driver.collect().groups]

    def _peer(self, strategy: Strategy) -> Collect:
        groups = Groups(self.engine, self.grader, self.setting.workload, self.sampling)
        return lambda: strategy(groups, self.setting.wanted)


def measure(name: str, setting: Setting) -> Figures:
    bench = Bench.of(setting)
    collect = bench.strategy(name)
    workload, engine, clock = setting.workload, bench.engine, bench.clock
    started = generated = 0.0
    committed: list[Lengths] = []
    passing: list[Lengths] = []
    for step in range(WARM_UP + setting.steps):
        engine.load((), step)
        if step == WARM_UP:
            started, generated = clock.now, engine.generated_tokens
        committed.append(workload.group_lengths(step, collect()))
        passing.append(workload.group_lengths(step, workload.passing(step, engine.launched)))
    trained = np.concatenate(committed[WARM_UP:])
    bias, error = length_bias(trained, np.concatenate(passing[WARM_UP:]))
    return Figures(
        strategy=name,
        pass_rate=workload.pass_rate,
        engines=setting.engines,
        generated_per_trained=(engine.generated_tokens - generated) / (float(trained.sum()) * workload.group_size),
        step_time_s=(clock.now - started) / setting.steps,
        length_bias=bias,
        length_bias_error=error,
    )


def length_bias(committed: Lengths, passing: Lengths) -> tuple[float, float]:
    """Of the choice of some groups among all that pass; both are mean response lengths per group, [groups].

    Returns the relative difference of the means, and its standard error had as many been chosen blindly.
    """
    mean, left_out = float(passing.mean()), 1 - len(committed) / len(passing)
    return float(committed.mean()) / mean - 1, float(passing.std(ddof=1)) / mean * sqrt(left_out / len(committed))
