import json
import os
from itertools import pairwise
from pathlib import Path

import pytest

from dapo_mcore.reward.math import MAX_ANSWER_CHARS, verify

DATA = Path(os.environ.get("DAPO_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))
FORMS = [r"So \boxed{%s}.", "The answer is $%s$.", "#### %s", "<answer>%s</answer>"]


def is_right(response: str, gold: str) -> bool:
    verdict = verify(response, gold, {})
    assert verdict.score == (1.0 if verdict.accuracy else -1.0)
    return verdict.accuracy == 1.0


def golds(*parts: str) -> list[str]:
    file = DATA.joinpath(*parts)
    if not file.is_file():
        pytest.skip(f"{'/'.join(parts)} is not in {DATA}; set DAPO_TEST_DATA to the folder that has it")
    with file.open() as lines:
        return [json.loads(line)["answer"].rsplit("####", 1)[-1].strip() for line in lines]


@pytest.mark.parametrize(
    ("response", "gold", "expected"),
    [
        (r"\boxed{42}", "42", True),
        (r"\boxed{x=42}", "42", True),
        (r"\boxed{\frac12}", "0.5", True),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", True),
        (r"\boxed{\{3, 1, 2\}}", r"\{1, 2, 3\}", True),
        (r"\boxed{[0,1)}", "[0,1]", False),
        (r"\boxed{1.41421356}", r"\sqrt{2}", True),
        ("Janet makes 9 * 2 = $18 every day.", "18", True),
        ("the answer is 70,000", "70000", True),
        (r"\boxed{\$70,000}", "70,000", True),
        (r"\boxed{41}", "42", False),
        (r"\boxed{42} is wrong, so \boxed{41}", "42", False),
        (r"\boxed{41} \boxed{42}", "42", True),
        (r"\boxed{41, 42}", "42", False),
        (r"\boxed{}", "42", False),
        (r"\boxed{\frac{}{", "42", False),
        ("", "42", False),
        ("no number at all", "42", False),
    ],
)
def test_answers_are_compared_as_mathematics(response, gold, expected):
    assert is_right(response, gold) is expected


PERCENTAGES = ["10%", r"$10\%$", r"\boxed{10\%}", r"\boxed{10%}", "The answer is 10%.", "#### 10 %"]


@pytest.mark.parametrize("response", PERCENTAGES)
@pytest.mark.parametrize("gold", ["10%", r"10\%", "10", "0.1", r"\frac{1}{10}"])
def test_a_percentage_is_its_number_and_its_fraction_however_it_is_written(response, gold):
    assert is_right(response, gold)


@pytest.mark.parametrize("response", PERCENTAGES)
@pytest.mark.parametrize("gold", ["1000", "0.001", "1%", "1000%", "0.1%", "11"])
def test_a_percentage_is_nothing_else(response, gold):
    assert not is_right(response, gold)


@pytest.mark.parametrize(
    ("response", "expected"), [("0.1", True), (r"\boxed{10}", True), ("1", False), ("0.001", False)]
)
def test_a_gold_percentage_may_be_answered_without_the_sign(response, expected):
    assert is_right(response, "10%") is expected


def test_an_answer_stands_at_the_end():
    assert is_right("word " * 10_000 + r"\boxed{42}", "42")
    assert not is_right(r"\boxed{42}" + " word" * 10_000, "42")


def test_an_answer_longer_than_any_gold_is_wrong():
    assert is_right(r"\boxed{42%s}" % ("+0" * 20), "42")
    assert not is_right(r"\boxed{42%s}" % ("+0" * MAX_ANSWER_CHARS), "42")


def test_a_gold_that_is_no_expression_is_an_error_not_a_wrong_answer():
    with pytest.raises(ValueError, match="gold answer"):
        verify(r"\boxed{2}", "", {})


@pytest.mark.parametrize("form", FORMS)
def test_gsm8k_golds_are_right_and_shifted_golds_are_wrong(form):
    answers = golds("gsm8k", "test.jsonl")[:300]
    assert len(answers) == 300
    assert [a for a in answers if not is_right("Now 1 + 1 = 2.\n" + form.replace("%s", a), a)] == []
    shifted = [str(int(a.replace(",", "")) + 1) for a in answers]
    assert [a for a, b in zip(answers, shifted, strict=True) if is_right(form.replace("%s", b), a)] == []


def test_math500_golds_are_right_and_their_neighbours_golds_are_wrong():
    answers = golds("math500", "test.jsonl")
    assert len(answers) == 500
    assert [a for a in answers if not is_right(rf"\boxed{{{a}}}", a)] == []
    different = [(a, b) for a, b in pairwise(answers) if a != b.removeprefix("x=")]
    assert [pair for pair in different if is_right(rf"\boxed{{{pair[1]}}}", pair[0])] == []
