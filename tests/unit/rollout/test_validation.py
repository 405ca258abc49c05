import math
from itertools import combinations

import pytest

from dapo_mcore.rollout.engine import Sampling
from dapo_mcore.rollout.validation import Validator, pass_at_k
from tests.unit.rollout.scripted import CountedStream, ExactGrader, ScriptedEngine


@pytest.mark.parametrize(("n", "correct", "k"), [(4, 0, 2), (4, 1, 2), (6, 2, 3), (5, 5, 2), (5, 4, 2)])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_answer(n, correct, k):
    subsets = list(combinations([True] * correct + [False] * (n - correct), k))
    assert math.isclose(pass_at_k(n, correct, k), sum(map(any, subsets)) / len(subsets))


def test_validation_reports_mean_and_pass_at_k_and_greedy():
    engine = ScriptedEngine(lambda uid, index: "right" if index == 0 and uid != 1 else "no")
    prompts = CountedStream().peek(0, 4)
    validator = Validator(engine, prompts, ExactGrader(), Sampling(1.0, 8), n=4, greedy=True, seed=0)
    metrics = {name: ratio.value for name, ratio in validator.validate().metrics.items()}
    assert metrics["val/accuracy"] == metrics["val/mean@4"] == 3 / 16
    assert metrics["val/pass@2"] == pytest.approx(3 / 4 * 2 / 4)
    assert metrics["val/pass@4"] == 3 / 4
    assert metrics["val/accuracy_greedy"] == 3 / 4


def test_every_validation_draws_the_same_random_numbers_and_none_of_training():
    engine = ScriptedEngine(lambda uid, index: "no")
    validator = Validator(engine, CountedStream().peek(0, 2), ExactGrader(), Sampling(1.0, 8), 2, False, seed=0)
    validator.validate()
    engine.version = 5
    validator.validate()
    seeds = [q.seed for q in engine.requests]
    assert seeds[:4] == seeds[4:]
