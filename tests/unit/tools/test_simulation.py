"""The simulated engines against one that counts tokens one by one, and the figures of the strategies."""

import json
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_mcore.rollout.engine import Request, Sampling
from tools import simulate
from tools.simulation.engine import SLICE_S, Clock, Cost, SimulatedEngine
from tools.simulation.measure import length_bias
from tools.simulation.workload import LENGTH_STEP, Workload

SAMPLING = Sampling(temperature=1.0, max_tokens=640)
WORKLOAD = Workload(pass_rate=0.5, group_size=4, mean_tokens=100, max_tokens=640, seed=3)
COST = Cost(step_s=0.5, sequence_s=0.25, prefill_s=0.0, max_num_seqs=3)


def requests(uids, first=0):
    return [Request(WORKLOAD.prompt(uid), index, seed=0) for uid in range(first, first + uids) for index in range(4)]


def length_of(request):
    return len(WORKLOAD.response(0, request.prompt.uid, request.index).token_ids)


def token_by_token(queue, replicas):
    """When each request finishes if every engine step is taken by itself."""
    queue, finished = deque(queue), {}
    batches = [{} for _ in range(replicas)]
    ends_of_step = [0.0] * replicas
    now = 0.0
    while queue or any(batches):
        for number in range(replicas):  # a step takes the time of the batch it began with
            if batches[number] and ends_of_step[number] == now:
                for key in list(batches[number]):
                    batches[number][key] -= 1
                    if not batches[number][key]:
                        finished[key] = now
                        del batches[number][key]
        while queue and min(map(len, batches)) < COST.max_num_seqs:
            request = queue.popleft()
            min(batches, key=len)[request.key] = length_of(request)
        for number in range(replicas):
            if batches[number] and ends_of_step[number] <= now:
                ends_of_step[number] = now + COST.step_s + COST.sequence_s * len(batches[number])
        now = min((end for batch, end in zip(batches, ends_of_step, strict=True) if batch), default=now)
    return finished


def finish_times(engine, clock):
    times = {}
    while finished := engine.poll():
        times |= {one.request.key: clock.now for one in finished}
    return times


@settings(max_examples=30, deadline=None)
@given(uids=st.integers(1, 6), first=st.integers(0, 500))
def test_one_replica_finishes_each_request_when_counting_tokens_says(uids, first):
    clock = Clock()
    engine = SimulatedEngine(WORKLOAD, 1, COST, clock)
    engine.submit(requests(uids, first), SAMPLING)
    simulated, counted = finish_times(engine, clock), token_by_token(requests(uids, first), 1)
    assert simulated.keys() == counted.keys()
    for key, time in counted.items():  # a poll reports what finished within a slice at the slice's end
        assert time - 1e-6 <= simulated[key] <= time + SLICE_S + 1e-6


@settings(max_examples=20, deadline=None)
@given(uids=st.integers(1, 12), replicas=st.integers(1, 5))
def test_every_request_finishes_once_and_every_token_is_counted(uids, replicas):
    clock = Clock()
    engine = SimulatedEngine(WORKLOAD, replicas, COST, clock)
    engine.submit(requests(uids), SAMPLING)
    keys = [one.request.key for finished in iter(engine.poll, []) for one in finished]
    assert sorted(keys) == [request.key for request in requests(uids)]
    assert engine.generated_tokens == sum(map(length_of, requests(uids)))


def test_more_replicas_share_the_requests_evenly():
    times = []
    for replicas in (1, 4):
        clock = Clock()
        engine = SimulatedEngine(WORKLOAD, replicas, COST, clock)
        engine.submit(requests(3), SAMPLING)
        finish_times(engine, clock)
        times.append(clock.now)
    assert engine.capacity == 4 * COST.max_num_seqs
    assert times[1] - SLICE_S == pytest.approx(max(map(length_of, requests(3))) * (0.5 + 3 * 0.25), rel=0.5)
    assert times[1] < 0.6 * times[0]


def test_an_aborted_request_costs_what_it_had_sampled_and_makes_room():
    clock = Clock()
    engine = SimulatedEngine(WORKLOAD, 1, COST, clock)
    first, second = requests(1), requests(1, first=7)
    engine.submit([*first[:3], second[0]], SAMPLING)  # three run, the fourth waits
    clock.now = 5.0  # four steps of 0.5 s + 3 x 0.25 s
    assert engine.abort([q.key for q in first]) == []
    assert engine.generated_tokens == 3 * 4
    clock.now = 5.0
    finished = [one.request for batch in iter(engine.poll, []) for one in batch]
    assert finished == [second[0]]
    assert clock.now == pytest.approx(5.0 + length_of(second[0]) * 0.75 + SLICE_S)


def test_prefill_holds_up_the_replica():
    cost = Cost(step_s=1.0, sequence_s=0.0, prefill_s=0.5, max_num_seqs=3)
    clock = Clock()
    engine = SimulatedEngine(WORKLOAD, 1, cost, clock)
    request = requests(1)[0]
    engine.submit([request], SAMPLING)
    engine.poll()
    assert clock.now == pytest.approx(0.5 * len(request.prompt.token_ids) + length_of(request) + SLICE_S)


@pytest.mark.parametrize("pass_rate", [0.1, 0.5, 0.9])
def test_the_workload_has_the_pass_rate_asked_for_and_longer_answers_to_harder_prompts(pass_rate):
    workload = Workload(pass_rate, group_size=16, mean_tokens=3_000, max_tokens=20_480, seed=1)
    answers = workload.draw(np.random.default_rng(0), 20_000)
    assert answers.passing.mean() == pytest.approx(pass_rate, abs=0.02)
    assert answers.lengths.mean() == pytest.approx(3_000, rel=0.04)
    assert answers.lengths.max() == 20_480
    solved, hopeless = answers.right.all(1), ~answers.right.any(1)
    assert answers.lengths[hopeless].mean() > 2 * answers.lengths[solved].mean()
    assert answers.lengths.sum() / answers.lengths[answers.passing].sum() == pytest.approx(1 / pass_rate, rel=0.05)


def test_an_answer_depends_on_version_prompt_and_index_alone():
    again = Workload(WORKLOAD.pass_rate, 4, 100, 640, seed=3)
    again.response(0, 5_000, 0)
    assert again.response(0, 17, 2) == WORKLOAD.response(0, 17, 2)
    lengths = {len(WORKLOAD.response(version, uid, 0).token_ids) for version in range(4) for uid in range(4)}
    assert len(lengths) > 3
    assert all(length % LENGTH_STEP == 0 for length in lengths)


def test_the_length_bias_is_zero_for_a_blind_choice_and_the_loss_of_length_for_another():
    rng = np.random.default_rng(9)
    answers = WORKLOAD.draw(rng, 4_000)
    passing = answers.lengths.mean(1)[answers.passing]
    blind = [length_bias(rng.choice(passing, 500, replace=False), passing) for _ in range(200)]
    biases, errors = np.array(blind).T
    assert biases.std() == pytest.approx(errors.mean(), rel=0.2)
    assert abs(biases.mean()) < 4 * errors.mean() / 200**0.5
    assert length_bias(passing, passing) == (0.0, 0.0)
    shortest, _ = length_bias(np.sort(passing)[:500], passing)
    assert shortest == pytest.approx(np.sort(passing)[:500].mean() / passing.mean() - 1)


def test_the_json_holds_one_object_per_strategy(capsys):
    simulate.main(["--pass-rate", "0.7", "--prompts", "16", "--engines", "4", "--steps", "2", "--json"])
    rows = {row["strategy"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == {"in_order", "full_batch_refill", "one_for_one", "first_finished"}
    assert rows["full_batch_refill"]["generated_per_trained"] > rows["one_for_one"]["generated_per_trained"] > 1
    assert all(row["step_time_s"] > 0 for row in rows.values())
    assert rows["first_finished"]["length_bias"] < rows["in_order"]["length_bias"]
