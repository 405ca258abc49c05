import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_mcore.config import OnExhausted
from dapo_mcore.rollout.engine import Sampling, request_seed
from dapo_mcore.rollout.leader import StopRun
from dapo_mcore.rollout.sampler import Sampler, every_group
from tests.unit.rollout.scripted import CountedStream, ExactGrader, ScriptedEngine

MIXED, RIGHT, WRONG = "mixed", "right", "wrong"


def sampler_of(kinds, wanted, per_round=0, max_rounds=100, on_exhausted=OnExhausted.train_partial, **options):
    """A sampler whose prompt k (modulo the script) gets right, wrong or mixed answers."""

    def answer(uid, index):
        kind = kinds[uid % len(kinds)]
        return {RIGHT: "right", WRONG: "no"}.get(kind, "right" if index == 0 else "no")

    stream = CountedStream()
    engine = ScriptedEngine(answer)
    sampling = Sampling(temperature=1.0, max_tokens=8)
    return Sampler(
        engine, stream, ExactGrader(), sampling, group_size=4, seed=7, wanted=wanted,
        per_round=per_round, max_rounds=max_rounds, on_exhausted=on_exhausted, **options,
    )  # fmt: skip


def uids(groups):
    return [group.prompt.uid for group in groups]


@given(
    kinds=st.lists(st.sampled_from([MIXED, RIGHT, WRONG]), min_size=1, max_size=12).filter(lambda k: MIXED in k),
    wanted=st.integers(1, 9),
    per_round=st.integers(0, 20),
)
def test_commits_what_reading_the_prompts_one_by_one_would_commit(kinds, wanted, per_round):
    sampler = sampler_of(kinds, wanted, per_round)
    sequential, uid = [], 0
    while len(sequential) < wanted:  # Algorithm 1, a prompt at a time
        if kinds[uid % len(kinds)] == MIXED:
            sequential.append(uid)
        uid += 1
    collected = sampler.collect()
    assert uids(collected.groups) == sequential
    assert sampler.prompts.position == uid
    assert uids(collected.considered) == list(range(uid))


def test_prompts_behind_the_last_committed_group_are_sampled_again_by_the_next_step():
    sampler = sampler_of([MIXED], wanted=3, per_round=8)
    assert uids(sampler.collect().groups) == [0, 1, 2]
    assert uids(sampler.collect().groups) == [3, 4, 5]


def test_without_the_filter_every_group_trains():
    sampler = sampler_of([RIGHT, MIXED], wanted=4, passes=every_group)
    collected = sampler.collect()
    assert uids(collected.groups) == [0, 1, 2, 3]
    assert len(collected.sampled) == 4


def test_a_spent_budget_trains_on_what_passed():
    sampler = sampler_of([MIXED, WRONG], wanted=10, per_round=4, max_rounds=2)
    assert uids(sampler.collect().groups) == [0, 2, 4, 6]
    assert sampler.prompts.position == 8


def test_a_spent_budget_stops_the_run_and_returns_its_prompts_when_asked_to():
    sampler = sampler_of([MIXED, WRONG], wanted=10, per_round=4, max_rounds=2, on_exhausted=OnExhausted.stop)
    with pytest.raises(StopRun, match=r"4 of 10 groups passed.*max_num_gen_batches=2"):
        sampler.collect()
    assert sampler.prompts.position == 0


@pytest.mark.parametrize(("kind", "state"), [(RIGHT, "solved"), (WRONG, "too hard")])
def test_data_without_any_mixed_group_stops_the_run_and_says_why(kind, state):
    sampler = sampler_of([kind], wanted=2, max_rounds=3)
    with pytest.raises(StopRun, match=state):
        sampler.collect()


def test_the_metrics_count_speculative_groups_as_sampled_and_rejected_ones_as_considered():
    metrics = sampler_of([MIXED, RIGHT, WRONG, MIXED, MIXED], wanted=2, per_round=5).collect().metrics()
    assert metrics["rollout/groups_sampled"].value == 5
    assert metrics["rollout/groups_trained"].value == 2
    assert metrics["rollout/pass_rate"].value == 2 / 4  # up to the second mixed group
    assert metrics["reward/accuracy"].value == pytest.approx((1 / 4 + 1 + 0 + 1 / 4) / 4)


def test_every_request_has_its_own_seed_whatever_was_sampled_with_it():
    once = sampler_of([MIXED], wanted=3, per_round=3)
    split = sampler_of([MIXED], wanted=3, per_round=1)
    once.collect(), split.collect()
    seeds = [q.seed for q in once.engine.requests]
    assert seeds == [q.seed for q in split.engine.requests]
    assert len(set(seeds)) == len(seeds) == 12


def test_seeds_differ_between_runs_versions_prompts_and_samples():
    base = (1, 2, 3, 4)
    others = [(9, 2, 3, 4), (1, 9, 3, 4), (1, 2, 9, 4), (1, 2, 3, 9), (12, 3, 4, 0)]
    assert len({request_seed(*key) for key in (base, *others)}) == 6
    assert all(0 <= request_seed(*key) < 2**63 for key in others)
