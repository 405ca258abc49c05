"""What a measurement states: figures with their bars, as text and as the line of JSON that `--json` ends with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FIGURES = "figures"


@dataclass(frozen=True, slots=True)
class Figure:
    """A value, and the bar it has to keep, if there is one: at most so much, or at least."""

    name: str
    value: float
    unit: str = ""
    bar: float | None = None
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """NaN holds no bar."""
        if self.bar is None:
            return True
        return self.value >= self.bar if self.at_least else self.value <= self.bar

    @property
    def bar_told(self) -> str:
        return "" if self.bar is None else f"{'>=' if self.at_least else '<='} {self.bar:.3g}{_spaced(self.unit)}"

    def __str__(self) -> str:
        number = f"{self.value:,.0f}" if abs(self.value) >= 1000 else f"{self.value:.4g}"
        return f"{number}{_spaced(self.unit)}"


def _spaced(unit: str) -> str:
    return f" {unit}" if unit else ""


def as_json(figures: Sequence[Figure], **details: Any) -> str:
    """One line."""
    return json.dumps({FIGURES: [asdict(figure) for figure in figures], **details})


def read_figures(file: Path) -> list[Figure]:
    """Of the last line that states some; none if no line does. Whatever else stands in the file is passed over."""
    for line in reversed(file.read_text(errors="replace").splitlines()):
        if (found := _parsed(line)) is not None:
            return [Figure(**figure) for figure in found[FIGURES]]
    return []


def _parsed(line: str) -> Mapping[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if FIGURES in found else None
