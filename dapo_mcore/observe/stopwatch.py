"""Seconds per phase of a step. Parts are wrapped when they are built, so the loop shows no timers."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Stopwatch:
    """Adds up the wall-clock seconds spent in wrapped calls, by phase."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    def wrap(self, phase: str, call: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(call)
        def timed(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start
            return result

        return timed

    def lap(self) -> dict[str, float]:
        """Seconds per phase since the last lap, as `time/<phase>_s`, and all of them as `time/step_s`; starts anew."""
        now = time.perf_counter()
        row = {f"time/{phase}_s": seconds for phase, seconds in self._seconds.items()}
        row["time/step_s"] = now - self._started
        self._seconds, self._started = {}, now
        return row
