"""Figures as PNG files: turned, mirrored and coloured at random."""

from __future__ import annotations

import cmath
from collections.abc import Callable, Sequence
from io import BytesIO
from math import pi
from random import Random

from PIL import Image, ImageDraw
from PIL.ImageFont import FreeTypeFont, load_default

from tools.geometry.figure import Figure, Label

SMOOTHING = 3  # lines are drawn so many times larger
INKS = ("black", "#1f3a93", "#7b1e1e", "#14532d", "#3b3b3b")
FONT_SHARE = 0.062  # height of the font, share of the picture's side
MARGIN = 2.1  # around the figure, in heights of the font: room for labels outside it


def render(figure: Figure, size: int, rng: Random) -> bytes:
    """A PNG of `size` x `size` pixels."""
    turn, is_mirrored = cmath.rect(1, rng.uniform(0, 2 * pi)), rng.random() < 0.5
    ink, width = rng.choice(INKS), max(1.0, size / 256 * rng.choice((1.0, 1.4, 1.8)))
    font_height = size * FONT_SHARE * rng.uniform(0.9, 1.1)

    def turned(point: complex) -> complex:
        """Pixels count downwards, so that an unmirrored figure is the conjugate one."""
        return turn * (point if is_mirrored else point.conjugate())

    strokes = [[turned(point) for point in stroke] for stroke in figure.strokes]
    place = _fitted([point for stroke in strokes for point in stroke], size, MARGIN * font_height)
    picture = Image.new("RGB", (SMOOTHING * size, SMOOTHING * size), "white")
    pen = ImageDraw.Draw(picture)
    for stroke in strokes:
        line = [SMOOTHING * place(point) for point in stroke]
        pen.line([(p.real, p.imag) for p in line], fill=ink, width=round(SMOOTHING * width), joint="curve")
    picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(picture)
    font = load_default(font_height)
    assert isinstance(font, FreeTypeFont)  # PIL is built with FreeType, else degrees cannot be written
    for label in figure.labels:
        _write(pen, label, place(turned(label.at)), turned(label.towards), font, ink)
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _fitted(points: Sequence[complex], size: int, margin: float) -> Callable[[complex], complex]:
    """Places the figure in the middle of the picture, as large as the margin allows."""
    columns, rows = [point.real for point in points], [point.imag for point in points]
    middle = complex(max(columns) + min(columns), max(rows) + min(rows)) / 2
    scale = (size - 2 * margin) / max(max(columns) - min(columns), max(rows) - min(rows))
    return lambda point: complex(size, size) / 2 + scale * (point - middle)


def _write(pen: ImageDraw.ImageDraw, label: Label, at: complex, towards: complex, font: FreeTypeFont, ink: str) -> None:
    """The label's nearest edge stands off from `at`; white around it keeps it apart from lines."""
    left, _, right, _ = font.getbbox(label.text)
    direction = towards / abs(towards)
    spot = at + direction * (label.gap * font.size + abs(direction.real) * max(0.0, right - left - font.size) / 2)
    pen.text((spot.real, spot.imag), label.text, fill=ink, font=font, anchor="mm", stroke_width=2, stroke_fill="white")
