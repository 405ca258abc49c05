"""Scores against those of verl's geo3k reward (tests/oracle/make_geo3k.py), and what the two see differently."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_mcore.reward.geometry import has_format, verify
from dapo_mcore.reward.verifiers import load_verifier
from tests.oracle.geo3k_inputs import RESPONSES, THOUGHT

STORED = json.loads((Path(__file__).parents[2] / "data" / "oracle" / "geo3k.json").read_text())
# Boxes with the gold's value that mathruler does not recognise: it wants integers as such, fractions reduced, no names.
EQUAL_VALUES = ["5°", r"\sqrt{25}", r"\frac{10}{2}", "10/2", "2+3", r"\frac{5}{1}", r"x=2\sqrt{221}", r"\frac{90}{4}",
                "90/4", "8π", r"m\angle ABC = 40", r"\angle 1 = 40^\circ", r"\theta = 40^\circ"]  # fmt: skip
# mathruler drops every space between digits.
BROKEN_NUMBERS = ["12 34"]
VERLS_FORMAT = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)


def framed(boxes: list[str]) -> set[str]:
    return {THOUGHT.replace("%s", box) for box in boxes}


def test_scores_are_those_of_verl_but_for_equal_values_that_it_does_not_recognise():
    assert len(STORED["scores"]) == len(RESPONSES) > 100
    different = set()
    for (response, answer), theirs in zip(RESPONSES, STORED["scores"], strict=True):
        ours = verify(response, answer, {}).score
        if ours != pytest.approx(theirs, abs=1e-12):
            different.add((response, ours, theirs))
    more = {(response, 1.0, 0.1) for response in framed(EQUAL_VALUES)}
    less = {(response, 0.1, 1.0) for response in framed(BROKEN_NUMBERS)}
    assert different == more | less


@pytest.mark.parametrize(
    ("response", "accuracy", "score"),
    [
        (r"<think>a</think> \boxed{5}", 1.0, 1.0),
        (r"\boxed{5}", 1.0, 0.9),
        (r"<think>a</think> \boxed{6}", 0.0, 0.1),
        ("5", 0.0, 0.0),
    ],
)
def test_the_answer_pays_nine_tenths_and_the_form_one_and_accuracy_does_not_know_the_form(response, accuracy, score):
    verdict = verify(response, "5", {})
    assert (verdict.accuracy, verdict.score) == (accuracy, score)
    plain = load_verifier("geometry_accuracy")(response, "5", {})
    assert (plain.accuracy, plain.score) == (accuracy, accuracy)


@given(st.lists(st.sampled_from(["<think>", "</think>", r"\boxed{", "}", "\n", "a"]), max_size=9).map("".join))
def test_the_form_is_what_verls_regular_expression_matches(response):
    assert has_format(response) == bool(VERLS_FORMAT.fullmatch(response))


def test_the_form_of_a_hostile_response_is_found_at_once():
    assert not has_format("<think>" + r"</think>\boxed{" * 200_000)


def test_degree_signs_of_the_gold_do_not_matter():
    assert verify(r"\boxed{40}", "40°", {}).accuracy == 1.0
    assert verify(r"\boxed{41}", r"40^\circ", {}).accuracy == 0.0


def test_a_gold_that_is_no_expression_is_an_error_not_a_wrong_answer():
    with pytest.raises(ValueError, match="gold answer"):
        verify(r"\boxed{2}", "", {})
