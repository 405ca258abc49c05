"""Whatever finishes first, is late, lost or aborted: a step commits what Algorithm 1 would, one prompt at a time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_mcore.config import OnExhausted
from dapo_mcore.rollout.collected import tokens_of
from dapo_mcore.rollout.leader import StopRun
from tests.unit.rollout.hostile import World, judge, read_sequentially
from tests.unit.rollout.machine import RUN_SEED, Machine, plans, survived, worlds

STEPS = 3
schedules = st.integers(0, 2**32)


def sequential(world, position, step, plan):
    names = ("wanted", "n", "budget", "max_samples", "filters")
    return read_sequentially(world, position, step, RUN_SEED, **{name: plan[name] for name in names})


def trains(expected, plan):
    if plan["on_exhausted"] is OnExhausted.stop:
        return len(expected) == plan["wanted"]
    return bool(expected)


def responses_of(groups):
    return [(group.prompt.uid, [sample.response for sample in group.samples]) for group in groups]


@settings(max_examples=150, deadline=None)
@given(world=worlds, schedule=schedules, plan=plans)
def test_every_step_commits_what_sequential_sampling_would_commit_and_leaves_nothing_behind(world, schedule, plan):
    machine = Machine(world, schedule, plan)
    for step in range(STEPS):
        position = machine.stream.position
        expected, then = sequential(world, position, step, plan)
        if not trains(expected, plan):
            with pytest.raises(StopRun):
                machine.collect(step)
            assert machine.stream.position == position
            return
        collected = machine.collect(step)
        assert responses_of(collected.groups) == sorted(expected.items())
        assert [group.prompt.uid for group in collected.considered] == list(range(position, then))
        assert all(s.verdict == judge(s.response) for group in collected.considered for s in group.samples)
        assert machine.stream.position == then
        assert not machine.engine.waiting
        assert not machine.grader.pending
        assert not machine.bank.entries


@settings(max_examples=60, deadline=None)
@given(world=worlds, schedule=schedules, plan=plans, polls=st.integers(0, 30))
def test_a_run_that_dies_in_the_middle_of_a_fill_neither_loses_nor_repeats_a_prompt(world, schedule, plan, polls):
    machine = Machine(world, schedule, plan, polls_to_live=polls)
    position, considered = 0, []
    for step in range(STEPS):
        expected, _ = sequential(world, position, step, plan)
        if not trains(expected, plan):
            return
        machine, collected = survived(machine, step)
        assert responses_of(collected.groups) == sorted(expected.items())
        considered += [group.prompt.uid for group in collected.considered]
        position = machine.stream.position
    assert considered == list(range(position))


def test_the_driver_gives_up_groups_in_mid_step_that_it_has_to_begin_again():
    """Some of what the tests above meet: what they say of it would otherwise be empty."""
    plan = {"wanted": 6, "n": 3, "budget": 40, "max_samples": 0, "filters": True, "hope": 10_000,
            "on_exhausted": OnExhausted.train_partial, "staleness": 0}  # fmt: skip
    again = 0
    for schedule in range(20):
        machine = Machine(World(schedule, 0.3), schedule, plan)
        for step in range(STEPS):
            collected = machine.collect(step)
            effort = {name: metric.total for name, metric in collected.effort.items()}
            assert 3 * effort["sampler/groups_submitted"] == len(machine.engine.submitted)
            unused = effort["sampler/generated_tokens"] - tokens_of(collected.considered)
            assert effort["sampler/wasted_fraction"] == unused
            again += len(machine.engine.submitted) - len(set(machine.engine.submitted))
    assert again > 0
