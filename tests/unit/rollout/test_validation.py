import math
from dataclasses import replace
from itertools import combinations

import pytest

from dapo_mcore.reward.verdicts import failed
from dapo_mcore.rollout.engine import Sampling
from dapo_mcore.rollout.validation import Validator, pass_at_k
from dapo_mcore.types import Outcome, Prompt
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


def sets_of(*sources: str) -> list[Prompt]:
    return [replace(prompt, source=s) for prompt, s in zip(CountedStream().peek(0, len(sources)), sources, strict=True)]


def measured(prompts, answer, grader=None, n=2) -> dict[str, float]:
    validator = Validator(ScriptedEngine(answer), prompts, grader or ExactGrader(), Sampling(1.0, 8), n, True, seed=0)
    return {name: ratio.value for name, ratio in validator.validate().metrics.items()}


def test_each_of_several_sets_is_measured_as_if_it_were_alone():
    def answer(uid, index):
        return {0: "right", 1: "no", 2: "right" if index == 0 else "wrong, at length"}[uid]

    mixed = measured(sets_of("aime", "openai/gsm8k", "aime"), answer)
    alone = {
        "aime": measured(sets_of("aime", "-", "aime")[::2], answer),
        "openai/gsm8k": measured(sets_of("-", "openai/gsm8k")[1:], answer),
    }
    assert mixed["val/aime/accuracy"] == 3 / 4
    assert mixed["val/openai/gsm8k/pass@2"] == 0
    for name, row in alone.items():
        assert {k: v for k, v in mixed.items() if k.startswith(f"val/{name}/")} == {
            k.replace("val/", f"val/{name}/"): v for k, v in row.items()
        }
    assert mixed["val/accuracy"] == 3 / 6, "over all problems, not over the sets"
    assert len(mixed) == 3 * len(alone["aime"])


def test_a_response_without_a_grade_counts_as_wrong_in_its_set_and_is_counted():
    class Hanging(ExactGrader):
        def grade(self, items):
            verdicts = super().grade(items)
            return [failed(Outcome.TIMEOUT, "") if p.uid == 1 else v for v, (p, _) in zip(verdicts, items, strict=True)]

    row = measured(sets_of("a", "b", "b"), lambda uid, index: "right", Hanging())
    assert (row["val/a/accuracy"], row["val/b/accuracy"], row["val/b/accuracy_greedy"]) == (1, 1 / 2, 1 / 2)
    assert (row["val/a/ungraded"], row["val/b/ungraded"], row["val/ungraded"]) == (0, 1 / 2, 1 / 3)


def test_every_validation_draws_the_same_random_numbers_and_none_of_training():
    engine = ScriptedEngine(lambda uid, index: "no")
    validator = Validator(engine, CountedStream().peek(0, 2), ExactGrader(), Sampling(1.0, 8), 2, False, seed=0)
    validator.validate()
    engine.version = 5
    validator.validate()
    seeds = [q.seed for q in engine.requests]
    assert seeds[:4] == seeds[4:]
