"""Who holds the accelerator's memory when."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dapo_mcore.turns import Turns


class Recorder:
    """A policy and an engine that write down what happens to them."""

    def __init__(self) -> None:
        self.events: list[str] = []

    @contextmanager
    def on_host(self) -> Iterator[None]:
        self.events.append("policy leaves")
        try:
            yield
        finally:
            self.events.append("policy is back")

    def wake(self) -> None:
        self.events.append("engine wakes")

    def sleep(self) -> None:
        self.events.append("engine sleeps")

    def sample(self, step: int) -> int:
        self.events.append(f"samples {step}")
        if step < 0:
            raise RuntimeError("no such step")
        return step * 2


TURN = ["policy leaves", "engine wakes", "samples {}", "engine sleeps", "policy is back"]


def test_the_engine_samples_while_the_policy_is_away() -> None:
    both = Recorder()
    assert Turns(both, both).of_engine(both.sample)(3) == 6
    assert both.events == [event.format(3) for event in TURN]


def test_the_turn_ends_when_sampling_fails() -> None:
    both = Recorder()
    with pytest.raises(RuntimeError, match="no such step"):
        Turns(both, both).of_engine(both.sample)(-1)
    assert both.events == [event.format(-1) for event in TURN]
