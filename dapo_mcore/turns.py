"""Trainer and engine hold the accelerator's memory in turns."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ParamSpec, Protocol, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Policy(Protocol):
    def rest(self) -> None:
        """What only updates need lies in host memory until the next one, as far as the policy's options say."""
        ...

    def on_host(self) -> AbstractContextManager[None]:
        """As `rest`, and while the block runs the weights lie there, too."""
        ...


class Sleeper(Protocol):
    def wake(self) -> None:
        """Take back what is needed to sample; the weights have been pushed."""
        ...

    def sleep(self) -> None:
        """Give all memory away, where the platform allows it. The weights must be pushed again."""
        ...


@dataclass(frozen=True, slots=True)
class Turns:
    """The trainer's turn is all the time that the engine does not sample. At a push both hold weights."""

    policy: Policy
    engine: Sleeper

    def of_engine(self, sample: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """`sample` in the engine's turn, which ends however the call ends."""

        @functools.wraps(sample)
        def turn(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            with self.policy.on_host():
                self.engine.wake()
                try:
                    return sample(*args, **kwargs)
                finally:
                    self.engine.sleep()

        return turn
