import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_mcore.reward.answers import TAIL_CHARS, last_boxed, last_tagged, marked_answer, tail

MARKS = ["<answer>", "</answer>", r"\boxed{", "{", "}", "a", "\n"]
TEXTS = st.lists(st.sampled_from(MARKS), max_size=16).map("".join)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{\frac{1}{2}} done", r"\frac{1}{2}"),
        (r"\boxed{1} or \boxed{2}", "2"),
        (r"\boxed{a \boxed{b}}", "b"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{", None),
        ("nothing", None),
    ],
)
def test_the_last_complete_box_counts(text, content):
    assert last_boxed(text) == content


@given(TEXTS)
def test_a_box_ends_where_its_braces_are_balanced(text):
    complete = []
    for box in re.finditer(r"\\boxed\{", text):
        rest = text[box.end() :]
        ends = (i for i, c in enumerate(rest) if c == "}" and rest[:i].count("{") == rest[:i].count("}"))
        complete += [rest[:end] for end in list(ends)[:1]]
    assert last_boxed(text) == (complete[-1] if complete else None)


@given(TEXTS)
def test_a_tag_is_what_a_regular_expression_finds_last(text):
    assert last_tagged(text) == ([None, *re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)])[-1]


@pytest.mark.parametrize("mark", ["<answer>", r"\boxed{", "</answer>"])
def test_a_mark_repeated_to_the_end_takes_no_longer_than_other_text(mark):
    """In quadratic time this would take hours."""
    assert marked_answer(mark * 400_000) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>7</answer> no, <answer> 8 </answer>", "8"),
        (r"<answer>it is \boxed{9}</answer>", "9"),
        (r"\boxed{1} <answer>2</answer>", "2"),
        ("<answer>two\nlines</answer>", "two\nlines"),
        ("<answer></answer>", ""),
        ("#### 5\nwait\n#### 6 \nmore", "6"),
        ("#### 5\nthe box is right: \\boxed{6}", "6"),
        ("the answer is 5", None),
    ],
)
def test_what_a_response_marks_as_its_answer(text, answer):
    assert marked_answer(text) == answer


def test_only_the_tail_is_looked_at():
    assert len(tail("x" * (TAIL_CHARS + 1))) == TAIL_CHARS
    assert tail("early" + "x" * TAIL_CHARS + "late").endswith("late")
