"""Answers are measured in the figures that the stored numbers give, and compared with the LaTeX of the files."""

import cmath
import json
import re
from fractions import Fraction
from io import BytesIO
from math import degrees, pi, sqrt

import pytest
from PIL import Image
from pyarrow import parquet

from dapo_mcore.config import SourceConfig
from dapo_mcore.prompts.images import ImageColumn
from dapo_mcore.prompts.readers import read_problems
from dapo_mcore.reward.geometry import verify
from tools.geometry.kinds import KINDS
from tools.geometry.latex import root_in_latex
from tools.make_geometry import main, make, numbers_of

TRAIN, VAL, SIZE = 150, 50, 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("geometry")
    make(folder, TRAIN, VAL, seed=3, size=SIZE)
    return folder


@pytest.fixture(scope="module")
def verl_rows(folder):
    return [
        row
        for split in ("train", "val")
        for row in parquet.read_table(folder / "verl" / f"{split}.parquet").to_pylist()
    ]


def angle_at(corner: complex, a: complex, b: complex) -> float:
    """Degrees."""
    turn = abs(cmath.phase((a - corner) / (b - corner)))
    return degrees(min(turn, 2 * pi - turn))


def area_of(a: complex, b: complex, c: complex) -> float:
    return abs(((b - a).conjugate() * (c - a)).imag) / 2


# kind -> the answer as measured between the figure's corners (drawn to scale), given the numbers
MEASURED = {
    "hypotenuse": lambda c, _: abs(c[1] - c[2]),
    "leg": lambda c, _: abs(c[0] - c[2]),
    "third_angle": lambda c, _: angle_at(c[2], c[0], c[1]),
    "exterior_angle": lambda c, _: 180 - angle_at(c[1], c[0], c[2]),
    "isosceles": lambda c, _: angle_at(c[0], c[1], c[2]),
    "inscribed_angle": lambda c, _: angle_at(c[2], c[0], c[1]),
    "half_chord": lambda c, _: abs(c[0] - c[1]) / 2,
    "tangent": lambda c, _: abs(c[0] - c[1]),
    "split_sides": lambda c, v: v["other"] * abs(c[4] - c[2]) / abs(c[4] - c[0]),
    "area": lambda c, _: area_of(*c),
    "thirty_sixty": lambda c, _: abs(c[1] - c[0]),
    "square_diagonal": lambda c, _: abs(c[2] - c[0]),
    "equilateral_height": lambda c, v: 2 * area_of(*c) / v["side"],
    "linear_pair": lambda c, v: angle_at(0, c[0], c[2]) / v["factor"],
    "fourth_angle": lambda c, _: angle_at(c[3], c[0], c[2]),
    "thales": lambda c, _: angle_at(c[1], c[0], c[2]),
}


def value_of(latex: str) -> float:
    """Of `a`, `a \\sqrt { n }` and fractions of these, read without any library."""
    fraction = re.fullmatch(r"\\frac \{ (.+) \} \{ (\d+) \}", latex)
    above, below = fraction.groups() if fraction else (latex, "1")
    parts = re.fullmatch(r"(\d*) ?(?:\\sqrt \{ (\d+) \})?", above)
    assert parts, latex
    return int(parts[1] or 1) * sqrt(int(parts[2] or 1)) / int(below)


def test_the_answer_is_what_the_figure_measures(verl_rows):
    assert len(verl_rows) == TRAIN + VAL
    for row in verl_rows:
        values = json.loads(row["extra_info"]["figure"])
        kind = values.pop("kind")
        corners = KINDS[kind].build("x", **values).corners
        assert value_of(row["reward_model"]["ground_truth"]) == pytest.approx(MEASURED[kind](corners, values)), kind


def test_the_figure_is_labelled_with_its_numbers_and_the_unknown(verl_rows):
    scenery = {"foot", "shift"}  # where things stand, which no label tells
    for row in verl_rows:
        values = json.loads(row["extra_info"]["figure"])
        kind = values.pop("kind")
        texts = [label.text for label in KINDS[kind].build("x", **values).figure.labels]
        told = {int(digits) for text in texts for digits in re.findall(r"\d+", text)}
        shown = {
            2 * value if name == "radius" and kind == "thales" else value
            for name, value in values.items()
            if name not in scenery
        }
        assert told - {30} == shown - {30}, kind
        assert sum("x" in text for text in texts) == (kind != "area")


def test_every_kind_of_problem_and_of_answer_occurs(verl_rows):
    assert {json.loads(row["extra_info"]["figure"])["kind"] for row in verl_rows} == set(KINDS) == set(MEASURED)
    answers = [row["reward_model"]["ground_truth"] for row in verl_rows]
    for form in (r"\d+", r"\d* ?\\sqrt \{ \d+ \}", r"\\frac \{ \d+ \} \{ \d+ \}", r"\\frac \{.*\\sqrt.*"):
        assert sum(bool(re.fullmatch(form, answer)) for answer in answers) >= 3, form


def test_the_problem_says_neither_numbers_nor_the_answer(folder):
    for row in parquet.read_table(folder / "train.parquet").to_pylist():
        assert re.fullmatch(r"<image>[A-Z][A-Za-z $?.]+", row["problem"])


def test_the_files_have_the_columns_of_geometry3k_and_pictures_of_the_size_asked_for(folder):
    table = parquet.read_table(folder / "val.parquet")
    types = {name: str(table.schema.field(name).type) for name in table.column_names}
    assert types.pop("images").replace("element:", "item:") == "list<item: struct<bytes: binary, path: string>>"
    assert types == {"problem": "string", "answer": "string"}
    for row in table.to_pylist():
        (picture,) = row["images"]
        with Image.open(BytesIO(picture["bytes"])) as image:
            assert (image.format, image.size) == ("PNG", (SIZE, SIZE))
            assert image.convert("L").getextrema()[0] < 128


def test_both_layouts_are_read_as_the_same_problems(folder):
    column = ImageColumn("images", SIZE * SIZE)
    for split, count in (("train", TRAIN), ("val", VAL)):
        plain = SourceConfig(files=[str(folder / f"{split}.parquet")], prompt_key="problem")
        prepared = SourceConfig(
            files=[str(folder / "verl" / f"{split}.parquet")], answer_key="reward_model.ground_truth"
        )
        one, other = (read_problems(source, "data.train", column) for source in (plain, prepared))
        assert [(p.answer, p.images) for p in one] == [(p.answer, p.images) for p in other]
        assert len(one) == count
        assert all(b.text.startswith(a.text + " You FIRST think") for a, b in zip(one, other, strict=True))


def test_the_verifier_reads_every_answer(verl_rows):
    answers = sorted({row["reward_model"]["ground_truth"] for row in verl_rows})
    assert [a for a in answers if verify(rf"\boxed{{{a}}}", a, {}).accuracy != 1.0] == []


def test_the_same_seed_gives_the_same_files_and_another_one_others(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make(tmp_path / name, 3, 2, seed, SIZE)
    files = [f"{layout}{split}.parquet" for layout in ("", "verl/") for split in ("train", "val")]
    for file in files:
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b != c


def test_a_larger_set_begins_with_the_smaller_one(tmp_path, folder):
    make(tmp_path, 5, VAL, seed=3, size=SIZE)
    smaller, larger = (parquet.read_table(where / "train.parquet").to_pylist() for where in (tmp_path, folder))
    assert smaller == larger[:5]


def test_no_numbers_of_validation_are_trained_on(verl_rows):
    train, val = (
        {row["extra_info"]["figure"] for row in verl_rows if row["extra_info"]["split"] == s} for s in ("train", "val")
    )
    assert not train & val


def test_a_validation_set_that_leaves_nothing_to_train_on_is_refused():
    class Everything(frozenset):
        def __contains__(self, _):
            return True

    with pytest.raises(ValueError, match=r"--val: .*leave none for training"):
        numbers_of(0, "train", 0, Everything())


@pytest.mark.parametrize("options", [["--train=0", "--val=1"], ["--train=1", "--val=1", "--size=20"]])
def test_sets_without_problems_and_illegible_pictures_are_refused(tmp_path, options):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "out"), "--seed=0", *options])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("square", "latex"),
    [
        (Fraction(25), "5"),
        (Fraction(1), "1"),
        (Fraction(3), r"\sqrt { 3 }"),
        (Fraction(884), r"2 \sqrt { 221 }"),
        (Fraction(2025, 4), r"\frac { 45 } { 2 }"),
        (Fraction(3, 4), r"\frac { \sqrt { 3 } } { 2 }"),
        (Fraction(27, 4), r"\frac { 3 \sqrt { 3 } } { 2 }"),
        (Fraction(1, 2), r"\frac { \sqrt { 2 } } { 2 }"),
        (Fraction(8, 9), r"\frac { 2 \sqrt { 2 } } { 3 }"),
    ],
)
def test_roots_are_written_in_lowest_terms(square, latex):
    assert root_in_latex(square) == latex
