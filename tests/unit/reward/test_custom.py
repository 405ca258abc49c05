from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from dapo_mcore.reward.custom import as_verdict, load_function


@pytest.mark.parametrize(
    ("value", "accuracy", "score"),
    [
        (True, 1.0, 1.0),
        (False, 0.0, -1.0),
        (np.bool_(True), 1.0, 1.0),
        (1, 1.0, 1.0),
        (0, 0.0, 0.0),
        (-1.0, 0.0, -1.0),
        (0.25, 0.25, 0.25),
        (np.float32(0.5), 0.5, 0.5),
        (Fraction(1, 2), 0.5, 0.5),
        ({"score": 0.5}, 0.5, 0.5),
        ({"score": 7.5, "acc": 1}, 1.0, 7.5),
        ({"score": -3.0, "acc": True}, 1.0, -3.0),
    ],
)
def test_what_a_users_function_may_return(value, accuracy, score):
    verdict = as_verdict(value, "pkg:f")
    assert (verdict.accuracy, verdict.score) == (accuracy, score)


@pytest.mark.parametrize(
    "value",
    [
        None,
        "1.0",
        (1.0, True),
        float("nan"),
        float("inf"),
        1.5,
        -2,
        Decimal("0.5"),
        np.array([1.0]),
        {"acc": 1.0},
        {"score": "1", "acc": 1.0},
        {"score": 2.0},
        {"score": float("nan"), "acc": 1.0},
        {"score": 1.0, "acc": 1.5},
        {"score": 1.0, "accuracy": 1.0},
    ],
)
def test_anything_else_is_refused_with_what_is_allowed(value):
    with pytest.raises(ValueError, match=r"reward.verifier=pkg:f returned .*: return a bool, a number in \[-1, 1\]"):
        as_verdict(value, "pkg:f")


def test_the_function_gets_response_answer_and_metadata(monkeypatch, tmp_path):
    (tmp_path / "my_rewards.py").write_text(
        "def f(response, answer, metadata):\n    return response == answer + metadata['suffix']\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    verify = load_function("my_rewards:f")
    assert verify("42!", "42", {"suffix": "!"}).accuracy == 1.0
    assert verify("42", "42", {"suffix": "!"}).accuracy == 0.0
