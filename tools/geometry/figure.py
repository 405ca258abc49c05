"""Figures of lines and labels in the complex plane, at their true proportions."""

from __future__ import annotations

import cmath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import pi, sin

CIRCLE_SIDES = 90
ARC_SIDES = 12
MARK = 0.22  # radius of an angle's arc, share of its shorter arm
RIGHT_MARK = 0.12
ARROW = 0.08  # length of an arrowhead, share of the first of two parallels


@dataclass(frozen=True, slots=True)
class Label:
    text: str
    at: complex
    towards: complex  # direction in which it stands off
    gap: float = 0.8  # how far its middle, in heights of the font; a wide text further where it stands beside


@dataclass(frozen=True, slots=True)
class Figure:
    strokes: tuple[tuple[complex, ...], ...] = ()
    labels: tuple[Label, ...] = ()


def together(*figures: Figure) -> Figure:
    return Figure(
        tuple(stroke for figure in figures for stroke in figure.strokes),
        tuple(label for figure in figures for label in figure.labels),
    )


def path(*points: complex) -> Figure:
    return Figure(strokes=(points,))


def polygon(*points: complex) -> Figure:
    return path(*points, points[0])


def circle(centre: complex, radius: float) -> Figure:
    return path(*(centre + cmath.rect(radius, 2 * pi * side / CIRCLE_SIDES) for side in range(CIRCLE_SIDES + 1)))


def length(text: str, a: complex, b: complex, inside: complex) -> Figure:
    """Label of the segment ab, on the side of it where `inside` is not."""
    normal = (b - a) * 1j
    if ((inside - a) * normal.conjugate()).real > 0:
        normal = -normal
    return Figure(labels=(Label(text, (a + b) / 2, normal),))


def angle(text: str, at: complex, a: complex, b: complex) -> Figure:
    """Arc and label of the angle at `at`, from the arm through `a` to the one through `b` (below a straight angle)."""
    turn = cmath.phase((b - at) / (a - at))
    first = (a - at) / abs(a - at)
    radius = MARK * min(abs(a - at), abs(b - at))
    arc = (at + radius * first * cmath.rect(1, turn * step / ARC_SIDES) for step in range(ARC_SIDES + 1))
    gap = max(1.6, 0.9 / sin(abs(turn) / 2))  # in a narrow angle there is room only further out
    return together(path(*arc), Figure(labels=(Label(text, at, first * cmath.rect(1, turn / 2), gap),)))


def right_angle(at: complex, a: complex, b: complex) -> Figure:
    """The square in a right angle between arms through `a` and `b`."""
    side = RIGHT_MARK * min(abs(a - at), abs(b - at))
    one, other = (side * (point - at) / abs(point - at) for point in (a, b))
    return path(at + one, at + one + other, at + other)


def parallel(*segments: tuple[complex, complex]) -> Figure:
    """The same arrowhead in the middle of each, which says that they are parallel."""
    (first, last), *_ = segments
    barb = ARROW * (last - first) * (-1 + 0.6j)
    middles = [(a + b) / 2 for a, b in segments]
    along = abs(last - first) / (last - first)
    return together(*(path(m + barb, m, m + (barb * along).conjugate() / along) for m in middles))


def names(letters: Iterable[str], points: Sequence[complex]) -> Figure:
    """Letters at corners, outside."""
    middle = sum(points) / len(points)
    return Figure(labels=tuple(Label(name, at, at - middle, 0.7) for name, at in zip(letters, points, strict=False)))
