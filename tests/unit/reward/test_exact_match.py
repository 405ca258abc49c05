import pytest

from dapo_mcore.reward.exact_match import verify


@pytest.mark.parametrize(
    ("response", "gold", "is_right"),
    [
        ("<answer>Red</answer>", "red", True),
        ("<answer> two  words\n</answer>", "two words", True),
        ("I think\nred.\n\n", "red", True),
        ("#### 70,000", "70000", True),
        ("#### $18", "18", True),
        (r"\boxed{(1,2)}", "(1,2)", True),
        (r"\boxed{1,2}", "12", False),
        ("<answer>0.5</answer>", "1/2", False),
        ("<answer>red</answer>", "blue", False),
        ("red is not it\nblue", "red", False),
        ("<answer></answer>", "", False),
        ("", "red", False),
    ],
)
def test_answers_are_compared_as_normalised_text(response, gold, is_right):
    verdict = verify(response, gold, {})
    assert (verdict.accuracy, verdict.score) == ((1.0, 1.0) if is_right else (0.0, -1.0))
