"""Runs a strategy for some steps and says what they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import hypot, sqrt

import numpy as np

from dapo_mcore.rollout.engine import Sampling
from tools.simulation.engine import Clock, Cost, SimulatedEngine
from tools.simulation.grader import SimulatedGrader
from tools.simulation.peers import PEERS, Groups, Strategy
from tools.simulation.workload import Workload

WARM_UP = 1  # steps that are not measured: what a strategy has learnt about the pass rate is not that of its first step
POPULATION = 20_000  # prompts that stand for all prompts


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
    length_bias: float  # mean length of the committed groups relative to that of all passing groups, minus 1
    length_bias_error: float  # standard error of length_bias


STRATEGIES = tuple(PEERS)

Collect = Callable[[int], list[int]]  # step -> uids of the committed groups


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

    def peer(self, strategy: Strategy) -> Collect:
        groups = Groups(self.engine, self.grader, self.setting.workload, self.sampling)
        return lambda _: strategy(groups, self.setting.wanted)


def measure(name: str, setting: Setting) -> Figures:
    bench = Bench.of(setting)
    collect = bench.peer(PEERS[name])
    workload, engine, clock = setting.workload, bench.engine, bench.clock
    started = generated = 0.0
    lengths: list[np.ndarray] = []
    for step in range(WARM_UP + setting.steps):
        engine.load((), step)
        if step == WARM_UP:
            started, generated = clock.now, engine.generated_tokens
        lengths.append(workload.group_lengths(step, collect(step)))
    committed = np.concatenate(lengths[WARM_UP:])
    bias, error = length_bias(committed, workload)
    return Figures(
        strategy=name,
        pass_rate=workload.pass_rate,
        engines=setting.engines,
        generated_per_trained=(engine.generated_tokens - generated) / (float(committed.sum()) * workload.group_size),
        step_time_s=(clock.now - started) / setting.steps,
        length_bias=bias,
        length_bias_error=error,
    )


def length_bias(committed: np.ndarray, workload: Workload) -> tuple[float, float]:
    """Relative difference of the mean of `committed`, [groups] mean tokens per group, and its standard error."""
    mean, error = _population(workload)
    own = float(committed.mean())
    return own / mean - 1, hypot(committed.std(ddof=1) / sqrt(len(committed)) / mean, own * error / mean**2)


@cache
def _population(workload: Workload) -> tuple[float, float]:
    """Mean and its standard error of the mean length of passing groups."""
    answers = workload.draw(np.random.default_rng(workload.seed + 1), POPULATION)
    means = answers.lengths[answers.passing].mean(1)
    return float(means.mean()), float(means.std(ddof=1) / sqrt(len(means)))
