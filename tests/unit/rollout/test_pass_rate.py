import json
import random

import pytest

from dapo_mcore.rollout.pass_rate import Outlook, PassRate, chance
from dapo_mcore.types import FinishReason, Group, Prompt, Response, Sample, Verdict


def group(row, *accuracies):
    response = Response((1,), (0.0,), "", FinishReason.STOP, 0)
    samples = tuple(Sample(response, Verdict(a, a)) for a in accuracies)
    return Group(Prompt(row, row, (1,), "", ""), samples)


def groups(first_row, passed, failed):
    mixed = [group(first_row + i, 0.0, 1.0) for i in range(passed)]
    return mixed + [group(first_row + passed + i, 0.0, 0.0) for i in range(failed)]


def test_the_rate_of_prompts_not_met_before_is_the_share_that_passed():
    rate = PassRate()
    assert rate.of(0) == 0.5
    rate.learn(groups(0, passed=180, failed=20))
    assert rate.of(1000) == pytest.approx(0.9, abs=0.01)


def test_the_rate_follows_the_policy():
    rate = PassRate()
    for step in range(30):
        rate.learn(groups(100 * step, passed=90 if step < 15 else 10, failed=10 if step < 15 else 90))
    assert rate.of(10**6) == pytest.approx(0.1, abs=0.05)


def test_prompts_met_again_are_told_apart_by_how_hard_they_were():
    rate = PassRate()
    for _ in range(5):
        rate.learn(groups(0, passed=50, failed=50))  # the same prompts pass every time
    assert rate.of(10) > 0.9
    assert rate.of(60) < 0.1
    assert 0 < rate.of(60) < rate.of(1000) < rate.of(10) < 1


def test_a_resumed_run_goes_on_with_the_same_rates():
    rate, resumed = PassRate(), PassRate()
    rate.learn(groups(0, 7, 3))
    rate.learn_order(8, [2, 3])
    resumed.load_state(json.loads(json.dumps(rate.state())))
    for one in (rate, resumed):
        one.learn(groups(0, 7, 3))
        one.learn_order(8, [2, 2, 5])
    assert resumed == rate


def drawn(size, rate, right_of_passing, groups, seed=0):
    """Groups of which a share `rate` passes, with so many right responses; in the order in which they finish."""
    draw = random.Random(seed)
    for _ in range(groups):
        passes = draw.random() < rate
        right = right_of_passing(draw) if passes else draw.choice([0, size])
        yield passes, draw.sample([True] * right + [False] * (size - right), size)


@pytest.mark.parametrize(
    "right_of_passing",
    [lambda draw: draw.randint(1, 7), lambda draw: draw.choice([1, 1, 1, 2])],
    ids=["any mixture", "seldom right"],
)
def test_the_chance_falls_with_every_response_that_is_like_the_others(right_of_passing):
    size, rate, learnt = 8, 0.6, PassRate()
    learnt.learn_order(
        size,
        [
            next(k for k in range(1, size + 1) if len(set(answers[:k])) == 2)
            for passes, answers in drawn(size, rate, right_of_passing, 4_000, seed=1)
            if passes
        ],
    )
    alike, passing = [0] * (size + 1), [0] * (size + 1)
    for passes, answers in drawn(size, rate, right_of_passing, 40_000):
        for count in range(1, size + 1):
            if len(set(answers[:count])) == 1:
                alike[count] += 1
                passing[count] += passes
    shares = learnt.alike(size)
    assert chance(rate, shares[0]) == rate
    for count in range(1, size + 1):
        assert chance(rate, shares[count]) == pytest.approx(passing[count] / alike[count], abs=0.03)


def test_before_any_group_was_seen_every_mixture_and_order_is_equally_likely():
    shares = PassRate().alike(4)  # 1, 2 or 3 right
    assert shares == pytest.approx([1, 1, (3 / 6 + 2 / 6 + 3 / 6) / 3, (1 / 4 + 0 + 1 / 4) / 3, 0])


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("missing", [1, 8, 100])
def test_as_many_groups_as_suffice_fill_the_batch_nine_times_in_ten(rate, missing):
    outlook, number = Outlook(), 0
    while not outlook.suffices(missing):
        outlook.add(rate)
        number += 1
    draw = random.Random(1)
    filled = sum(sum(draw.random() < rate for _ in range(number)) >= missing for _ in range(1000)) / 1000
    assert 0.86 <= filled <= (0.96 if rate < 0.9 else 1.0)
