"""Metrics as fractions that are divided once, when they are written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ratio:
    """A numerator and its count. Parts measured on different tokens, ranks or micro-batches add up exactly."""

    total: float
    count: float

    def __add__(self, other: Ratio) -> Ratio:
        return Ratio(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        """total / count; NaN when nothing was counted."""
        return self.total / self.count if self.count else float("nan")


def merge(parts: Iterable[Mapping[str, Ratio]]) -> dict[str, Ratio]:
    """The sum of each metric over all parts that hold it."""
    merged: dict[str, Ratio] = {}
    for part in parts:
        for name, ratio in part.items():
            merged[name] = merged[name] + ratio if name in merged else ratio
    return merged
