"""Kinds of problems: the numbers of one, drawn at random, and from these its figure and its answer.

A kind is a pair of functions. The first draws the numbers that the picture shows; the second gives the figure, with the
unknown under the name `x`, and the square of the answer, which makes a fraction of every root.
"""

from __future__ import annotations

import cmath
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import acos, radians, sin, sqrt, tan
from random import Random

from tools.geometry.figure import Figure, angle, circle, length, parallel, path, polygon, right_angle, together

Values = dict[str, int]
ASK_X = ("Find ${x}$.", "Find the value of ${x}$.", "What is ${x}$?", "Find ${x}$ in the figure.")


@dataclass(frozen=True, slots=True)
class Drawn:
    figure: Figure
    square: Fraction  # of the answer
    corners: Sequence[complex] = ()  # that may get letters


@dataclass(frozen=True, slots=True)
class Kind:
    draw: Callable[[Random], Values]
    build: Callable[..., Drawn]
    questions: Sequence[str] = ASK_X


def legs(rng: Random) -> Values:
    a = rng.randint(2, 40)
    return {"a": a, "b": rng.randint(max(2, a // 2), min(40, 2 * a))}


def hypotenuse(x: str, a: int, b: int) -> Drawn:
    o, p, q = 0j, complex(a), complex(0, b)
    figure = together(polygon(o, p, q), right_angle(o, p, q), length(f"{a}", o, p, q), length(f"{b}", o, q, p),
                      length(x, p, q, o))  # fmt: skip
    return Drawn(figure, Fraction(a * a + b * b), (o, p, q))


def leg_and_hypotenuse(rng: Random) -> Values:
    a = rng.randint(2, 40)
    return {"a": a, "c": rng.randint(a + max(1, a // 6), 2 * a)}


def leg(x: str, a: int, c: int) -> Drawn:
    b = sqrt(c * c - a * a)
    o, p, q = 0j, complex(a), complex(0, b)
    figure = together(polygon(o, p, q), right_angle(o, p, q), length(f"{a}", o, p, q), length(x, o, q, p),
                      length(f"{c}", p, q, o))  # fmt: skip
    return Drawn(figure, Fraction(c * c - a * a), (o, p, q))


def two_angles(rng: Random) -> Values:
    alpha = rng.randint(30, 110)
    return {"alpha": alpha, "beta": rng.randint(25, 155 - alpha)}


def _triangle(alpha: float, beta: float) -> tuple[complex, complex, complex]:
    """Corners with angles alpha at 0 and beta at 1, in degrees; counter-clockwise."""
    side = sin(radians(beta)) / sin(radians(alpha + beta))
    return 0j, 1 + 0j, cmath.rect(side, radians(alpha))


def third_angle(x: str, alpha: int, beta: int) -> Drawn:
    o, p, q = _triangle(alpha, beta)
    figure = together(
        polygon(o, p, q), angle(f"{alpha}°", o, p, q), angle(f"{beta}°", p, q, o), angle(f"{x}°", q, o, p)
    )
    return Drawn(figure, Fraction(180 - alpha - beta) ** 2, (o, p, q))


def exterior_angle(x: str, alpha: int, beta: int) -> Drawn:
    o, p, q = _triangle(alpha, 180 - alpha - beta)
    beyond = 1.6 + 0j
    figure = together(polygon(o, p, q), path(p, beyond), angle(f"{alpha}°", o, p, q), angle(f"{beta}°", q, o, p),
                      angle(f"{x}°", p, beyond, q))  # fmt: skip
    return Drawn(figure, Fraction(alpha + beta) ** 2, (o, p, q))


def apex(rng: Random) -> Values:
    return {"apex": rng.randint(30, 125), "side": rng.randint(3, 60)}


def isosceles(x: str, apex: int, side: int) -> Drawn:
    o, p, q = _triangle((180 - apex) / 2, (180 - apex) / 2)
    figure = together(polygon(o, p, q), length(f"{side}", o, q, p), length(f"{side}", p, q, o),
                      angle(f"{apex}°", q, o, p), angle(f"{x}°", o, p, q))  # fmt: skip
    return Drawn(figure, Fraction(180 - apex, 2) ** 2, (o, p, q))


def central(rng: Random) -> Values:
    return {"central": rng.randint(50, 160), "shift": rng.randint(-12, 12)}


def inscribed_angle(x: str, central: int, shift: int) -> Drawn:
    """Both stand on the same arc; the corner of the inscribed one is `shift` degrees away from the middle opposite."""
    p, q, corner = (cmath.rect(1, radians(place)) for place in (0, central, central / 2 + 180 + shift))
    figure = together(circle(0, 1), path(p, 0, q), path(p, corner, q), angle(f"{central}°", 0, p, q),
                      angle(f"{x}°", corner, p, q))  # fmt: skip
    return Drawn(figure, Fraction(central, 2) ** 2, (p, q, corner))


def radius_and_distance(rng: Random) -> Values:
    radius = rng.randint(4, 40)
    return {"radius": radius, "distance": rng.randint(max(2, radius // 3), radius - max(1, radius // 5))}


def half_chord(x: str, radius: int, distance: int) -> Drawn:
    half = sqrt(radius * radius - distance * distance)
    foot, p, q = complex(0, -distance), complex(-half, -distance), complex(half, -distance)
    figure = together(
        circle(0, radius), path(p, q), path(foot, 0, q), right_angle(foot, 0, p), length(f"{distance}", 0, foot, q),
        length(f"{radius}", 0, q, foot), length(x, foot, q, 0),
    )  # fmt: skip
    return Drawn(figure, Fraction(radius**2 - distance**2), (p, q))


def radius_and_point(rng: Random) -> Values:
    radius = rng.randint(2, 30)
    return {"radius": radius, "distance": rng.randint(radius + max(1, radius // 2), 3 * radius)}


def tangent(x: str, radius: int, distance: int) -> Drawn:
    touching = cmath.rect(radius, acos(radius / distance))
    outside = complex(distance)
    figure = together(circle(0, radius), path(0, touching, outside, 0), right_angle(touching, 0, outside),
                      length(f"{radius}", 0, touching, outside), length(f"{distance}", 0, outside, touching),
                      length(x, touching, outside, 0))  # fmt: skip
    return Drawn(figure, Fraction(distance**2 - radius**2), (touching, outside))


def parallel_cut(rng: Random) -> Values:
    upper = rng.randint(2, 20)
    return {"upper": upper, "lower": rng.randint(max(2, upper // 2), 2 * upper), "other": rng.randint(2, 30)}


def split_sides(x: str, upper: int, lower: int, other: int) -> Drawn:
    """A parallel to the base cuts one side into `upper` and `lower`, the other into `other` and the unknown."""
    top, share = 0j, upper / (upper + lower)
    left, right = cmath.rect(upper + lower, radians(240)), cmath.rect(upper + lower, radians(305))
    p, q = share * left, share * right
    figure = together(polygon(top, left, right), path(p, q), parallel((p, q), (left, right)),
                      length(f"{upper}", top, p, right), length(f"{lower}", p, left, right),
                      length(f"{other}", top, q, left), length(x, q, right, left))  # fmt: skip
    return Drawn(figure, Fraction(lower * other, upper) ** 2, (top, left, right, p, q))


def base_and_height(rng: Random) -> Values:
    base = rng.randint(4, 40)
    return {"base": base, "height": rng.randint(max(2, base // 2), base), "foot": rng.randint(30, 70)}


def area(_: str, base: int, height: int, foot: int) -> Drawn:
    """The height stands `foot` hundredths along the base."""
    o, p, below = 0j, complex(base), complex(base * foot / 100)
    q = below + complex(0, height)
    figure = together(polygon(o, p, q), path(below, q), right_angle(below, q, p), length(f"{base}", o, p, q),
                      length(f"{height}", below, q, o))  # fmt: skip
    return Drawn(figure, Fraction(base * height, 2) ** 2, (o, p, q))


def side(rng: Random) -> Values:
    return {"side": rng.randint(2, 120)}


def thirty_sixty(x: str, side: int) -> Drawn:
    """The longer leg of a right triangle whose shorter one, opposite to 30 degrees, is `side`."""
    o, p, q = 0j, complex(side * tan(radians(60))), complex(0, side)
    figure = together(polygon(o, p, q), right_angle(o, p, q), angle("30°", p, q, o), length(f"{side}", o, q, p),
                      length(x, o, p, q))  # fmt: skip
    return Drawn(figure, Fraction(3 * side * side), (o, p, q))


def square_diagonal(x: str, side: int) -> Drawn:
    o, p, q, r = 0j, complex(side), complex(side, side), complex(0, side)
    marks = (right_angle(at, a, b) for at, a, b in ((p, o, q), (r, q, o)))
    figure = together(polygon(o, p, q, r), path(o, q), *marks, length(f"{side}", o, p, q), length(f"{side}", p, q, o),
                      length(x, o, q, r))  # fmt: skip
    return Drawn(figure, Fraction(2 * side * side), (o, p, q, r))


def equilateral_height(x: str, side: int) -> Drawn:
    o, p, below = 0j, complex(side), complex(side / 2)
    q = below + complex(0, side * sin(radians(60)))
    sides = (length(f"{side}", a, b, inside) for a, b, inside in ((o, p, q), (p, q, o), (q, o, p)))
    figure = together(polygon(o, p, q), path(below, q), right_angle(below, q, p), *sides, length(x, below, q, o))
    return Drawn(figure, Fraction(3 * side * side, 4), (o, p, q))


def angle_and_factor(rng: Random) -> Values:
    return {"alpha": rng.randint(35, 145), "factor": rng.randint(2, 9)}


def linear_pair(x: str, alpha: int, factor: int) -> Drawn:
    ray = cmath.rect(1, radians(alpha))
    figure = together(path(-1, 1), path(0, ray), angle(f"{alpha}°", 0, 1, ray), angle(f"{factor}{x}°", 0, ray, -1))
    return Drawn(figure, Fraction(180 - alpha, factor) ** 2, (-1, 1, ray))


def three_angles(rng: Random) -> Values:
    return {name: rng.randint(70, 100) for name in ("alpha", "beta", "gamma")}


def fourth_angle(x: str, alpha: int, beta: int, gamma: int) -> Drawn:
    """Corners 0, 1, and r on the side that leaves 0 at `alpha`; the last lies where the sides from 1 and r meet."""
    delta = 360 - alpha - beta - gamma
    o, p, r = 0j, 1 + 0j, cmath.rect(0.8, radians(alpha))
    from_p, from_r = cmath.rect(1, radians(180 - beta)), cmath.rect(1, radians(alpha + 180 + delta))
    q = p + from_p * ((r - p) / from_r).imag / (from_p / from_r).imag
    figure = together(polygon(o, p, q, r), angle(f"{alpha}°", o, p, r), angle(f"{beta}°", p, q, o),
                      angle(f"{gamma}°", q, r, p), angle(f"{x}°", r, o, q))  # fmt: skip
    return Drawn(figure, Fraction(delta) ** 2, (o, p, q, r))


def acute(rng: Random) -> Values:
    return {"alpha": rng.randint(25, 65), "radius": rng.randint(2, 40)}


def thales(x: str, alpha: int, radius: int) -> Drawn:
    """The angle over a diameter (a dot marks the centre) is right, which the figure does not say."""
    p, q, corner = -1 + 0j, 1 + 0j, cmath.rect(1, radians(2 * alpha))
    figure = together(circle(0, 1), circle(0, 0.02), polygon(p, q, corner), angle(f"{alpha}°", p, q, corner),
                      angle(f"{x}°", q, corner, p), length(f"{2 * radius}", p, q, corner))  # fmt: skip
    return Drawn(figure, Fraction(90 - alpha) ** 2, (p, q, corner))


KINDS = {
    "hypotenuse": Kind(legs, hypotenuse),
    "leg": Kind(leg_and_hypotenuse, leg),
    "third_angle": Kind(two_angles, third_angle),
    "exterior_angle": Kind(two_angles, exterior_angle),
    "isosceles": Kind(apex, isosceles),
    "inscribed_angle": Kind(central, inscribed_angle),
    "half_chord": Kind(radius_and_distance, half_chord),
    "tangent": Kind(radius_and_point, tangent),
    "split_sides": Kind(parallel_cut, split_sides),
    "area": Kind(base_and_height, area, ("Find the area of the triangle.", "What is the area of the figure?")),
    "thirty_sixty": Kind(side, thirty_sixty),
    "square_diagonal": Kind(side, square_diagonal),
    "equilateral_height": Kind(side, equilateral_height),
    "linear_pair": Kind(angle_and_factor, linear_pair),
    "fourth_angle": Kind(three_angles, fourth_angle),
    "thales": Kind(acute, thales),
}
