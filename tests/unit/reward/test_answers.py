import pytest

from dapo_mcore.reward.answers import TAIL_CHARS, last_boxed, marked_answer, tail


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
