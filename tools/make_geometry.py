"""Draws a stand-in for Geometry3k: geometry problems whose numbers stand in the picture alone.

    python -m tools.make_geometry OUT --train 2000 --val 200 --seed 0

Writes OUT/train.parquet and OUT/val.parquet with the columns of hiyouga/geometry3k (images, problem, answer), and the
same problems in OUT/verl as verl prepares them. The same arguments give the same files with the same version of PIL.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from tools.geometry.figure import names, together
from tools.geometry.kinds import KINDS
from tools.geometry.latex import root_in_latex
from tools.geometry.render import render

SOURCE = "hiyouga/geometry3k"
INSTRUCTION = (
    "You FIRST think about the reasoning process as an internal monologue and then provide the final answer. The "
    "reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in \\boxed{}."
)
UNKNOWNS, LETTERS = "xyzwn", "ABCDEFGHJKLMPQRSTV"
LETTERED = 0.6  # share of figures whose corners have names
MAX_DRAWS = 1_000  # for one problem, before its numbers count as used up
SMALLEST = 96  # pixels
ROWS_AT_ONCE = 200
IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
ROWS = pa.schema([("images", IMAGES), ("problem", pa.string()), ("answer", pa.string())])
MESSAGES = pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))
EXTRA = pa.struct([(name, pa.string()) for name in ("answer", "figure", "question", "split")] + [("index", pa.int64())])
VERL_ROWS = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", MESSAGES),
        ("images", IMAGES),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
        ("extra_info", EXTRA),
    ]
)


@dataclass(frozen=True, slots=True)
class Numbers:
    """What makes two problems the same, however they are drawn."""

    kind: str
    values: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Problem:
    numbers: Numbers
    question: str
    answer: str
    png: bytes

    def row(self) -> dict[str, Any]:
        return {"images": [{"bytes": self.png, "path": None}], "problem": self.question, "answer": self.answer}

    def verl_row(self, split: str, index: int) -> dict[str, Any]:
        """`extra_info.figure` has the kind and the numbers of the picture, as JSON."""
        figure = json.dumps({"kind": self.numbers.kind, **dict(self.numbers.values)})
        return {
            "data_source": SOURCE,
            "prompt": [{"role": "user", "content": f"{self.question} {INSTRUCTION}"}],
            "images": self.row()["images"],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": self.answer},
            "extra_info": {
                "split": split, "index": index, "answer": self.answer, "question": self.question, "figure": figure,
            },
        }  # fmt: skip


def numbers_of(seed: int, split: str, index: int, taken: Collection[Numbers] = ()) -> tuple[Numbers, Random]:
    """Kind and values of a problem that `taken` does not have, and what draws the rest of it.

    Raises:
        ValueError: none is left.
    """
    rng = Random(f"{seed}/{split}/{index}")
    for _ in range(MAX_DRAWS):
        kind = rng.choice(list(KINDS))
        numbers = Numbers(kind, tuple(KINDS[kind].draw(rng).items()))
        if numbers not in taken:
            return numbers, rng
    raise ValueError(f"--val: its {len(taken)} different problems leave none for training; ask for fewer")


def problem_of(numbers: Numbers, size: int, rng: Random) -> Problem:
    kind, values = KINDS[numbers.kind], dict(numbers.values)
    unknown, letters = rng.choice(UNKNOWNS), rng.sample(LETTERS, 6)
    drawn = kind.build(unknown, **values)
    named = names(letters if rng.random() < LETTERED else "", drawn.corners)
    question = "<image>" + rng.choice(kind.questions).format(x=unknown)
    return Problem(numbers, question, root_in_latex(drawn.square), render(together(drawn.figure, named), size, rng))


def write(folder: Path, split: str, count: int, problem_at: Callable[[int], Problem]) -> None:
    """`count` problems in both layouts."""
    with (
        parquet.ParquetWriter(folder / f"{split}.parquet", ROWS) as plain,
        parquet.ParquetWriter(folder / "verl" / f"{split}.parquet", VERL_ROWS) as prepared,
    ):
        for start in range(0, count, ROWS_AT_ONCE):
            batch = {index: problem_at(index) for index in range(start, min(start + ROWS_AT_ONCE, count))}
            rows = [problem.row() for problem in batch.values()]
            plain.write_table(pa.Table.from_pylist(rows, ROWS))
            verl_rows = [problem.verl_row(split, index) for index, problem in batch.items()]
            prepared.write_table(pa.Table.from_pylist(verl_rows, VERL_ROWS))


def make(folder: Path, train: int, val: int, seed: int, size: int) -> None:
    """Raises ValueError when validation would leave nothing to train on: the two have no numbers in common."""
    held_out = {numbers_of(seed, "val", index)[0] for index in range(val)}

    def training(index: int) -> Problem:
        numbers, rng = numbers_of(seed, "train", index, held_out)
        return problem_of(numbers, size, rng)

    def validation(index: int) -> Problem:
        numbers, rng = numbers_of(seed, "val", index)
        return problem_of(numbers, size, rng)

    (folder / "verl").mkdir(parents=True, exist_ok=True)
    write(folder, "val", val, validation)
    write(folder, "train", train, training)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the files")
    parser.add_argument("--train", type=int, required=True, help="problems to train on")
    parser.add_argument("--val", type=int, required=True, help="problems to validate on")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--size", type=int, default=256, help="pixels of a picture's side")
    given = parser.parse_args(arguments)
    if min(given.train, given.val) < 1 or given.size < SMALLEST:
        parser.error(f"--train and --val count problems, at least 1; --size is at least {SMALLEST}, to be legible")
    try:
        make(given.out, given.train, given.val, given.seed, given.size)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{given.out}: {given.train} problems to train on, {given.val} to validate on; {given.out / 'verl'}: the same"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
