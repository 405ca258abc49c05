"""Perimeters of drawn triangles whose lengths stand in the picture alone, worked solutions, and disjoint sets.

A policy that adds side by side is right far more often than one that answers at once. The last line is the answer:

    question  <image>?
    worked    3+5=8, 8+2=10 and 10, each on a line of its own
    bare      10
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import product
from pathlib import Path
from random import Random

import pyarrow as pa
from PIL import Image, ImageDraw
from PIL.ImageFont import load_default
from pyarrow import parquet

from tools.make_geometry import ROWS

Sides = tuple[int, ...]  # lengths of the left, right and lower side, 1 to 9

QUESTION = "?"
SIZE, CELL = (96, 64), 32  # pixels of a picture, and of a visual token's side
TOKENS = (SIZE[0] // CELL) * (SIZE[1] // CELL)  # visual tokens of a picture
CORNERS = ((48, 3), (70, 31), (26, 31))  # clockwise from the upper one
LABELS = ((16, 16), (80, 16), (48, 48))  # in the order of the sides
LABEL_TOKENS = tuple(y // CELL * (SIZE[0] // CELL) + x // CELL for x, y in LABELS)  # visual tokens that hold them
JITTER = 2  # pixels
FONT_HEIGHT = 26
INKS = ("black", "#1f3a93", "#7b1e1e", "#14532d")


@dataclass(frozen=True, slots=True)
class ProblemSets:
    """No three lengths are in two of them."""

    validation: Sequence[Sides]  # the same for every seed
    training: Sequence[Sides]
    warm_start: Sequence[Sides]


def problem_sets(seed: int, validation: int, training: int) -> ProblemSets:
    """`validation` and `training` count problems; all others are the warm start's."""
    every = list(product(range(1, 10), repeat=3))
    Random("validation").shuffle(every)
    held_out, others = every[:validation], every[validation:]
    Random(f"training/{seed}").shuffle(others)
    return ProblemSets(held_out, others[:training], others[training:])


def draw(sides: Sides, rng: Random) -> Image.Image:
    """The lengths stand at the sides, which are not to scale: not every three lengths make a triangle."""

    def near(point: tuple[int, int]) -> tuple[float, float]:
        return point[0] + rng.uniform(-JITTER, JITTER), point[1] + rng.uniform(-JITTER, JITTER)

    picture, ink = Image.new("RGB", SIZE, "white"), rng.choice(INKS)
    pen, font = ImageDraw.Draw(picture), load_default(FONT_HEIGHT)
    pen.polygon([near(corner) for corner in CORNERS], outline=ink)
    for side, place in zip(sides, LABELS, strict=True):
        pen.text(near(place), str(side), fill=ink, font=font, anchor="mm")
    return picture


def worked(sides: Sides) -> str:
    """The sum side by side, then the answer."""
    total, *rest = sides
    lines: list[str] = []
    for side in rest:
        lines.append(f"{total}+{side}={total + side}")
        total += side
    return "\n".join([*lines, bare(sides)])


def bare(sides: Sides) -> str:
    return str(sum(sides))


def write(file: Path, problems: Sequence[Sides], rng: Random) -> None:
    """With the columns of hiyouga/geometry3k."""
    rows = [{"images": [{"bytes": png(draw(sides, rng)), "path": None}], "problem": f"<image>{QUESTION}",
             "answer": bare(sides)} for sides in problems]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(rows, ROWS), file)


def png(picture: Image.Image) -> bytes:
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
