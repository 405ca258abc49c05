"""Options that change over the training, as functions of the training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from dapo_mcore.config import RunConfig

Value = TypeVar("Value")


def piecewise(stages: Sequence[tuple[float, Value]], after: Value, total_steps: int) -> Callable[[int], Value]:
    """Training step, from 1 -> value: that of the first stage (until, value) that is not over, else `after`.

    A stage holds for the steps that begin before the share `until` of `total_steps` is done.
    """

    def value_at(step: int) -> Value:
        return next((value for until, value in stages if step - 1 < until * total_steps), after)

    return value_at


def temperature_schedule(config: RunConfig) -> Callable[[int], float]:
    """Of the rollout, and so of the loss."""
    stages = [(stage.until, stage.value) for stage in config.rollout.temperature_schedule]
    return piecewise(stages, config.rollout.temperature, config.trainer.total_training_steps)


def group_size_schedule(config: RunConfig) -> Callable[[int], int]:
    """Responses per prompt."""
    stages = [(stage.until, stage.value) for stage in config.rollout.n_schedule]
    return piecewise(stages, config.rollout.n, config.trainer.total_training_steps)
