"""Exact answers as Geometry3k writes them."""

from __future__ import annotations

from fractions import Fraction
from math import isqrt


def root_in_latex(square: Fraction) -> str:
    r"""The root of a positive fraction in lowest terms: `5`, `\frac { 45 } { 2 }`, `2 \sqrt { 221 }`."""
    below = square.denominator
    outside, inside = _without_squares(square.numerator * below)  # sqrt(p / q) = sqrt(p q) / q
    shown = Fraction(outside, below)
    above = f"{shown.numerator}"
    if inside > 1:
        above = f"{'' if shown.numerator == 1 else above + ' '}" rf"\sqrt {{ {inside} }}"
    return above if shown.denominator == 1 else rf"\frac {{ {above} }} {{ {shown.denominator} }}"


def _without_squares(number: int) -> tuple[int, int]:
    """(a, b) with number = a * a * b and b free of squares."""
    outside, inside = 1, number
    for factor in range(2, isqrt(number) + 1):
        while inside % (factor * factor) == 0:
            outside, inside = outside * factor, inside // (factor * factor)
    return outside, inside
