"""rollout.staleness above 0: what a step sampled ahead is used as long as it may be, whatever happens in between."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_mcore.config import OnExhausted
from dapo_mcore.rollout.engine import request_seed
from dapo_mcore.rollout.leader import StopRun
from dapo_mcore.types import FinishReason
from tests.unit.rollout.hostile import judge
from tests.unit.rollout.machine import RUN_SEED, Machine, stale_plans, survived, worlds

STEPS = 4


def is_whole(response):
    return response.finish_reason is not FinishReason.ABORTED


def goes_on_from(response, before):
    """Whether a response is `before`, or what was sampled behind it by later weights."""
    if is_whole(before):
        return response == before
    kept = len(before.token_ids)
    return response == before or (
        response.token_ids[:kept] == before.token_ids
        and response.logprobs[:kept] == before.logprobs
        and response.version == before.version
        and response.continued[: len(before.continued)] == before.continued
        and response.continued[len(before.continued)][0] == kept
    )


def is_as_sampled(machine, key, response):
    """Every token and log-probability is that of the version said to have sampled it."""
    segments = [(0, response.version), *response.continued, (len(response.token_ids), None)]
    tokens = [
        machine.world.token(version, request_seed(RUN_SEED, version, *key), position)
        for (start, version), (stop, _) in pairwise(segments)
        for position in range(start, stop)
    ]
    return list(zip(response.token_ids, response.logprobs, strict=True)) == tokens


def check_the_groups(machine, step, position, collected):
    plan, considered = machine.plan, collected.considered
    passing = [group for group in considered if machine.passes(group)]
    if collected.groups:
        assert list(collected.groups) == passing
        assert machine.stream.position == position + len(considered)
    else:
        assert plan["on_exhausted"] is OnExhausted.carry_over
        assert machine.stream.position == position
    assert [group.prompt.uid for group in considered] == list(range(position, position + len(considered)))
    for group in considered:
        sizes = {plan["n"]} if plan["max_samples"] <= plan["n"] else {*range(plan["n"], plan["max_samples"] + 1)}
        assert len(group.samples) in sizes
        for index, sample in enumerate(group.samples):
            response, key = sample.response, (group.prompt.uid, index)
            assert is_whole(response)
            assert sample.verdict == judge(response)
            assert step - plan["staleness"] <= response.version <= step
            assert is_as_sampled(machine, key, response)


def check_a_short_batch(machine, step, collected):
    plan, versions = machine.plan, [s.response.version for g in collected.groups for s in g.samples]
    if 0 < len(collected.groups) < plan["wanted"]:
        assert plan["on_exhausted"] is not OnExhausted.stop
        if plan["on_exhausted"] is OnExhausted.carry_over:
            assert min(versions) == step - plan["staleness"]


def check_the_bank(machine, step, held, collected):
    """`held`: what it held before the step."""
    oldest, entries, engine = step - machine.plan["staleness"], machine.bank.entries, machine.engine
    now = {(g.prompt.uid, index): s.response for g in collected.considered for index, s in enumerate(g.samples)}
    consumed = {key for key in now if key[0] < machine.stream.position}
    assert not consumed & entries.keys()
    for key, response in (now | {key: banked.response for key, banked in entries.items()}).items():
        before = held.get(key)
        if before is not None and before.response.version >= oldest:
            assert goes_on_from(response, before.response)
            assert not (is_whole(before.response) and key in engine.submitted)
        else:
            assert response == engine.sampled[key]
            assert response.version == step
            assert not response.continued
    fresh = {key for key, banked in held.items() if banked.response.version >= oldest}
    assert fresh | engine.sampled.keys() <= now.keys() | entries.keys()
    for key, response in engine.sampled.items():
        assert now.get(key, response) == response
        assert key in consumed or entries[key].response == response
    for banked in entries.values():
        assert banked.verdict in (None, judge(banked.response) if is_whole(banked.response) else None)


@settings(max_examples=150, deadline=None)
@given(
    world=worlds,
    schedule=st.integers(0, 2**32),
    plan=stale_plans,
    polls=st.one_of(st.just(1 << 30), st.integers(0, 30)),
    restarts=st.sets(st.integers(1, STEPS - 1)),
)
def test_nothing_that_was_sampled_is_lost_used_twice_too_old_or_taken_for_what_it_is_not(
    world, schedule, plan, polls, restarts
):
    machine = Machine(world, schedule, plan, polls_to_live=polls)
    for step in range(STEPS):
        state = machine.state()
        if step in restarts:
            machine = machine.resumed(state)
            assert machine.state() == state
        position, held = machine.stream.position, dict(machine.bank.entries)
        try:
            machine, collected = survived(machine, step)
        except StopRun:
            return
        check_the_groups(machine, step, position, collected)
        check_a_short_batch(machine, step, collected)
        check_the_bank(machine, step, held, collected)
