import json
import math
import random

import pytest

from dapo_mcore.algo.groups import passes_filter
from dapo_mcore.rollout.pass_rate import Outlook, PassRate, age_at, chance, revealing_length
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
    rate.learn(groups(0, passed=180, failed=20), 2)
    assert rate.of(1000) == pytest.approx(0.9, abs=0.01)


def test_the_rate_follows_the_policy():
    rate = PassRate()
    for step in range(30):
        rate.learn(groups(100 * step, passed=90 if step < 15 else 10, failed=10 if step < 15 else 90), 2)
    assert rate.of(10**6) == pytest.approx(0.1, abs=0.05)


def test_prompts_met_again_are_told_apart_by_how_hard_they_were():
    rate = PassRate()
    for _ in range(5):
        rate.learn(groups(0, passed=50, failed=50), 2)  # the same prompts pass every time
    assert rate.of(10) > 0.9
    assert rate.of(60) < 0.1
    assert 0 < rate.of(60) < rate.of(1000) < rate.of(10) < 1


def test_a_resumed_run_goes_on_with_the_same_rates():
    rate, resumed = PassRate(), PassRate()
    rate.learn(groups(0, 7, 3), 2)
    resumed.load_state(json.loads(json.dumps(rate.state())))
    for one in (rate, resumed):
        one.learn(groups(0, 7, 3), 2)
    assert resumed == rate


def answered(row, *lengths_and_accuracies):
    """A group of these responses."""
    samples = tuple(
        Sample(Response((1,) * length, (0.0,) * length, "", FinishReason.STOP, 0), Verdict(a, a))
        for length, a in lengths_and_accuracies
    )
    return Group(Prompt(row, row, (1,), "", ""), samples)


def test_a_group_shows_that_it_passes_when_the_first_response_that_differs_is_as_long_as_that():
    assert revealing_length(answered(0, (9, 1.0), (3, 0.0), (5, 0.0), (7, 1.0)), 4) == 7
    assert revealing_length(answered(0, (9, 1.0), (3, 0.0)), 2) == 9
    assert revealing_length(answered(0, (2, 0.0), (3, 0.0), (4, 1.0)), 2) == math.inf


def drawn(number, rate, seed):
    """Groups of 6, of which a share `rate` passes: easy ones are short, and short ones pass less often."""
    draw = random.Random(seed)
    for row in range(number):
        is_easy = draw.random() < 0.5
        passes = draw.random() < (rate - 0.2 if is_easy else rate + 0.2)
        right = draw.randint(1, 5) if passes else 6 * is_easy
        mean = 100 if is_easy else 400
        yield answered(row, *((1 + int(draw.expovariate(1 / mean)), float(i < right)) for i in range(6)))


@pytest.mark.parametrize("length", [20, 100, 400])
def test_as_many_groups_pass_as_their_chances_say_however_long_they_have_been_sampled_for(length):
    rate, learnt, number, expected = 0.5, PassRate(), 4_000, 0.0
    learnt.learn(drawn(4_000, rate, seed=1), 6)
    alike = learnt.alike(6)
    for group in drawn(number, rate, seed=2):
        done = [s for s in group.samples if len(s.response.token_ids) <= length]
        mixed = passes_filter(Group(group.prompt, tuple(done)))
        expected += 1.0 if mixed else chance(rate, alike.share(len(done), age_at(length)))
    assert expected == pytest.approx(sum(map(passes_filter, drawn(number, rate, seed=2))), rel=0.03)


def test_before_any_group_was_seen_every_mixture_and_order_is_equally_likely():
    shares = [PassRate().alike(4).share(graded, 0) for graded in range(5)]  # 1, 2 or 3 right
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
