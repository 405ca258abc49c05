from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_mcore.algo.groups import every_group
from dapo_mcore.config import OnExhausted
from dapo_mcore.reward.verdicts import failed
from dapo_mcore.rollout.bank import Bank
from dapo_mcore.rollout.driver import Driver
from dapo_mcore.rollout.engine import Sampling, request_seed
from dapo_mcore.rollout.leader import StopRun
from dapo_mcore.types import Outcome
from tests.unit.rollout.scripted import CountedStream, ExactGrader, ScriptedEngine

MIXED, RIGHT, WRONG = "mixed", "right", "wrong"


def driver_of(kinds, wanted, budget=1000, capacity=64, **options):
    """A driver whose prompt k (modulo the script) gets right, wrong or mixed answers."""

    def answer(uid, index):
        kind = kinds[uid % len(kinds)]
        return {RIGHT: "right", WRONG: "no"}.get(kind, "right" if index == 0 else "no")

    stream = CountedStream()
    engine = ScriptedEngine(answer, capacity=capacity)
    sampling = Sampling(temperature=1.0, max_tokens=8)
    return Driver(
        engine, stream, ExactGrader(), sampling, group_size=4, seed=7, wanted=wanted, budget=budget, **options
    )


def uids(groups):
    return [group.prompt.uid for group in groups]


@given(
    kinds=st.lists(st.sampled_from([MIXED, RIGHT, WRONG]), min_size=1, max_size=12).filter(lambda k: MIXED in k),
    wanted=st.integers(1, 9),
    capacity=st.integers(1, 40),
)
def test_commits_what_reading_the_prompts_one_by_one_would_commit(kinds, wanted, capacity):
    driver = driver_of(kinds, wanted, capacity=capacity)
    sequential, uid = [], 0
    while len(sequential) < wanted:  # Algorithm 1, a prompt at a time
        if kinds[uid % len(kinds)] == MIXED:
            sequential.append(uid)
        uid += 1
    collected = driver.collect()
    assert uids(collected.groups) == sequential
    assert driver.prompts.position == uid
    assert uids(collected.considered) == list(range(uid))


def test_prompts_behind_the_last_committed_group_are_sampled_again_by_the_next_step():
    driver = driver_of([MIXED], wanted=3)
    assert uids(driver.collect().groups) == [0, 1, 2]
    assert len(driver.engine.requests) > 3 * 4
    assert uids(driver.collect().groups) == [3, 4, 5]


def test_without_the_filter_every_group_trains_and_none_is_sampled_ahead():
    driver = driver_of([RIGHT, MIXED], wanted=4, passes=every_group)
    assert uids(driver.collect().groups) == [0, 1, 2, 3]
    assert len(driver.engine.requests) == 4 * 4


class FailsOnce(ExactGrader):
    """Has no verdict on the first response to each prompt."""

    def submit(self, key, prompt, response):
        super().submit(key, prompt, response)
        if key[1] == 0:
            self.waiting[key] = failed(Outcome.TIMEOUT, "")


def test_a_response_without_a_grade_does_not_make_a_solved_group_an_unsolved_one():
    driver = replace(driver_of([RIGHT, WRONG, WRONG], wanted=3, passes=every_group), grader=FailsOnce())
    metrics = driver.collect().metrics()
    for share, number in (("all_right", 1), ("all_wrong", 2)):
        assert metrics[f"rollout/{share}_fraction"].total == number
        assert metrics[f"sampler/groups_{share}"].total == number


@pytest.mark.parametrize("capacity", [1, 8, 1000])
def test_a_spent_budget_trains_on_what_passed(capacity):
    driver = driver_of([MIXED, WRONG], wanted=10, budget=8, capacity=capacity)
    assert uids(driver.collect().groups) == [0, 2, 4, 6]
    assert driver.prompts.position == 8


def test_a_spent_budget_stops_the_run_and_returns_its_prompts_when_asked_to():
    driver = driver_of([MIXED, WRONG], wanted=10, budget=8, on_exhausted=OnExhausted.stop)
    with pytest.raises(StopRun, match=r"4 of 10 groups passed.*8 prompts.*max_num_gen_batches"):
        driver.collect()
    assert driver.prompts.position == 0


@pytest.mark.parametrize(("kind", "state"), [(RIGHT, "solved"), (WRONG, "too hard")])
@pytest.mark.parametrize("on_exhausted", OnExhausted)
def test_data_without_any_mixed_group_stops_the_run_and_says_why(kind, state, on_exhausted):
    driver = driver_of([kind], wanted=2, budget=6, on_exhausted=on_exhausted, bank=Bank(staleness=1))
    with pytest.raises(StopRun, match=state):
        driver.collect()


def test_the_metrics_tell_what_was_needed_from_what_was_sampled_ahead():
    metrics = driver_of([MIXED, RIGHT, WRONG, MIXED, MIXED], wanted=2).collect().metrics()
    values = {name: metric.value for name, metric in metrics.items()}
    assert values["rollout/groups_sampled"] == 4  # up to the second mixed group
    assert values["rollout/groups_trained"] == 2
    assert values["rollout/pass_rate"] == 2 / 4
    assert values["reward/accuracy"] == pytest.approx((1 / 4 + 1 + 0 + 1 / 4) / 4)
    assert values["rollout/temperature"] == 1.0
    assert values["rollout/group_size"] == 4
    ahead = values["sampler/groups_submitted"]
    assert ahead > 4
    needed = 2 * ("right" + "no" * 3) + "right" * 4 + "no" * 4
    assert values["sampler/generated_tokens"] > len(needed)
    wasted = values["sampler/generated_tokens"] - len(needed)
    assert values["sampler/wasted_fraction"] == pytest.approx(wasted / values["sampler/generated_tokens"])
    assert values["sampler/generated_per_trained_token"] == values["sampler/generated_tokens"] / (
        2 * len("rightnonono")
    )


def test_every_request_has_its_own_seed_whatever_was_sampled_with_it():
    together, alone = driver_of([MIXED], wanted=3, capacity=64), driver_of([MIXED], wanted=3, capacity=1)
    together.collect(), alone.collect()
    seeds = {q.key: q.seed for q in together.engine.requests}
    assert len(set(seeds.values())) == len(seeds)
    others = {q.key: q.seed for q in alone.engine.requests}
    assert len(others) < len(seeds)
    assert others.items() <= seeds.items()


@pytest.mark.parametrize("most", [9, 10])  # groups of 4 grow to 8 and from there by one, and by two
@pytest.mark.parametrize("capacity", [1, 3, 100])
def test_a_group_without_variance_grows_until_it_has_some_or_is_as_large_as_allowed(capacity, most):
    first_right = {0: 5, 1: most - 1, 2: 0, 3: 50, 4: 11}  # prompt -> index of its only right answer

    def answer(uid, index):
        return "right" if first_right[uid % 5] == index else "no"

    driver = replace(
        driver_of([MIXED], wanted=3, capacity=capacity, max_samples=most),
        engine=ScriptedEngine(answer, capacity=capacity),
    )
    collected = driver.collect()
    assert [(g.prompt.uid, len(g.samples)) for g in collected.groups] == [(0, 8), (1, most), (2, 4)]
    assert driver.prompts.position == 3


def test_seeds_differ_between_runs_versions_prompts_and_samples():
    base = (1, 2, 3, 4)
    others = [(9, 2, 3, 4), (1, 9, 3, 4), (1, 2, 9, 4), (1, 2, 3, 9), (12, 3, 4, 0)]
    assert len({request_seed(*key) for key in (base, *others)}) == 6
    assert all(0 <= request_seed(*key) < 2**63 for key in others)
