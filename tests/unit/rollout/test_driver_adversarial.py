"""Whatever finishes first, is late, lost or aborted: a step commits what Algorithm 1 would, one prompt at a time."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_mcore.config import OnExhausted
from dapo_mcore.rollout.driver import Driver
from dapo_mcore.rollout.engine import Sampling
from dapo_mcore.rollout.leader import StopRun
from dapo_mcore.rollout.pass_rate import PassRate
from tests.unit.rollout.hostile import Crash, HostileEngine, HostileGrader, Stream, World, judge, read_sequentially

RUN_SEED = 11
STEPS = 3

worlds = st.builds(World, number=st.integers(0, 10_000), hardness=st.sampled_from([0.0, 0.3, 0.7, 0.95]))
schedules = st.integers(0, 2**32)
plans = st.fixed_dictionaries(
    {
        "wanted": st.integers(1, 7),
        "n": st.integers(2, 5),
        "budget": st.sampled_from([4, 9, 40]),
        "max_samples": st.sampled_from([0, 0, 6, 8]),
    }
)


class Machine:
    """A run's process: what it has in memory is gone when it crashes, the state it saved is not."""

    def __init__(self, world, schedule, plan, polls_to_live=1 << 30, position=0, learnt=None):
        draw = random.Random(schedule)
        self.plan = plan
        self.stream = Stream(world, position)
        self.engine = HostileEngine(world, draw, draw.choice([2, 5, 16, 1000]), polls_to_live)
        self.grader = HostileGrader(draw)
        self.pass_rate = PassRate()
        if learnt:
            self.pass_rate.load_state(learnt)

    def collect(self, step):
        self.engine.load((), step)
        self.engine.submitted.clear()
        return Driver(
            self.engine,
            self.stream,
            self.grader,
            Sampling(temperature=1.0, max_tokens=8),
            group_size=self.plan["n"],
            seed=RUN_SEED,
            wanted=self.plan["wanted"],
            budget=self.plan["budget"],
            on_exhausted=OnExhausted.train_partial,
            max_samples=self.plan["max_samples"],
            pass_rate=self.pass_rate,
        ).collect()


def sequential(world, position, step, plan):
    return read_sequentially(world, position, step, RUN_SEED, **plan)


def responses_of(groups):
    return {group.prompt.uid: [sample.response for sample in group.samples] for group in groups}


@settings(max_examples=700, deadline=None)
@given(world=worlds, schedule=schedules, plan=plans)
def test_every_step_commits_what_sequential_sampling_would_commit_and_leaves_nothing_behind(world, schedule, plan):
    machine = Machine(world, schedule, plan)
    for step in range(STEPS):
        position = machine.stream.position
        expected, then = sequential(world, position, step, plan)
        if not expected:
            with pytest.raises(StopRun):
                machine.collect(step)
            assert machine.stream.position == position
            return
        collected = machine.collect(step)
        assert list(responses_of(collected.groups).items()) == sorted(expected.items())
        assert [group.prompt.uid for group in collected.considered] == list(range(position, then))
        assert all(s.verdict == judge(s.response) for group in collected.considered for s in group.samples)
        assert machine.stream.position == then
        assert not machine.engine.waiting
        assert not machine.grader.pending
        assert len(set(machine.engine.submitted)) == len(machine.engine.submitted)


@settings(max_examples=300, deadline=None)
@given(world=worlds, schedule=schedules, plan=plans, polls=st.integers(0, 60), more=schedules)
def test_a_run_that_dies_in_the_middle_of_a_fill_neither_loses_nor_repeats_a_prompt(world, schedule, plan, polls, more):
    machine = Machine(world, schedule, plan, polls_to_live=polls)
    position, learnt, considered = 0, machine.pass_rate.state(), []
    for step in range(STEPS):
        expected, _ = sequential(world, position, step, plan)
        if not expected:
            return
        try:
            collected = machine.collect(step)
        except Crash:
            machine = Machine(world, more, plan, position=position, learnt=learnt)
            collected = machine.collect(step)
        assert responses_of(collected.groups) == expected
        considered += [group.prompt.uid for group in collected.considered]
        position, learnt = machine.stream.position, machine.pass_rate.state()
    assert considered == list(range(position))
