"""What is sampled while others train. A single process: rank 0 alone."""

from __future__ import annotations

from threading import Event

import pytest

from dapo_mcore.rollout.ahead import SamplingAhead
from dapo_mcore.rollout.collected import Collected
from dapo_mcore.rollout.leader import StopRun
from tests.unit.rollout.scripted import ScriptedEngine

LAST_STEP = 3


class Prompts:
    """Stands for what a checkpoint keeps of the run: collecting the groups of a step moves it on."""

    def __init__(self) -> None:
        self.position = 0
        self.may_finish = Event()
        self.collected: list[int] = []

    def collect(self, step: int) -> Collected:
        self.collected.append(step)
        self.may_finish.wait()
        if step == 2:
            raise StopRun("solved")
        self.position += 10
        return Collected((), ())

    def state(self) -> dict[str, int]:
        return {"position": self.position}


@pytest.fixture
def prompts():
    return Prompts()


@pytest.fixture
def ahead(prompts):
    return SamplingAhead(ScriptedEngine(lambda uid, index: ""), LAST_STEP, prompts.collect, prompts.state)


def test_a_checkpoint_holds_the_state_before_the_groups_that_nothing_was_trained_on(ahead, prompts):
    ahead.start(1)
    assert ahead.state() == {"position": 0}
    prompts.may_finish.set()
    ahead.wait()
    assert prompts.position == 10
    assert ahead.state() == {"position": 0}
    ahead.take()
    ahead.start(3)
    assert ahead.state() == {"position": 10}
    ahead.take()


def test_what_ends_the_run_is_told_to_who_takes_the_groups_not_to_who_waits(ahead, prompts):
    prompts.may_finish.set()
    ahead.start(2)
    ahead.wait()
    with pytest.raises(StopRun, match="solved"):
        ahead.take()


def test_nothing_is_sampled_behind_the_last_step_and_nothing_waited_for(ahead, prompts):
    ahead.wait()
    prompts.may_finish.set()
    prompts.position = 30
    ahead.start(LAST_STEP + 1)
    ahead.wait()
    assert prompts.collected == []
    assert ahead.state() == {"position": 30}
