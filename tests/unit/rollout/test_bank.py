import json

import pytest

from dapo_mcore.rollout.bank import Bank, Banked
from dapo_mcore.types import FinishReason, Outcome, Response, Verdict

TERMS = [4, 1.0]


def response(version, reason=FinishReason.STOP, **more):
    return Response((5, 6, 7), (-0.1, -1 / 3, -2.5), "abc", reason, version, **more)


def bank_of(staleness, versions):
    """One response per prompt: uid -> version."""
    bank = Bank(staleness)
    bank.open(max(versions.values()), TERMS)
    for uid, version in versions.items():
        bank.keep((uid, 0), Banked(response(version), Verdict(1.0, 1.0)))
    return bank


def test_without_staleness_nothing_is_kept_and_what_is_dropped_is_counted():
    bank = bank_of(0, {4: 1, 5: 1})
    assert bank.entries == {}
    assert bank.dropped_tokens == 6


@pytest.mark.parametrize(("staleness", "left"), [(1, {3}), (2, {2, 3}), (3, {1, 2, 3})])
def test_a_response_waits_so_many_steps_and_then_expires(staleness, left):
    bank = bank_of(staleness, {1: 1, 2: 2, 3: 3})
    bank.open(4, TERMS)
    assert {uid for uid, _ in bank.entries} == left
    assert bank.expired_groups == 3 - len(left)
    assert bank.dropped_tokens == 3 * (3 - len(left))


@pytest.mark.parametrize("terms", [[8, 1.0], [4, 0.9]])
def test_responses_of_another_group_size_or_temperature_are_not_used(terms):
    bank = bank_of(2, {1: 3})
    bank.open(3, terms)
    assert bank.entries == {}
    assert bank.expired_groups == 1


def test_a_group_is_held_when_all_its_first_responses_are_there_and_graded():
    bank = bank_of(1, {7: 1})
    assert bank.holds_group(7, 1)
    assert not bank.holds_group(7, 2)
    bank.keep((7, 1), Banked(response(1)))
    assert not bank.holds_group(7, 2)


def test_a_checkpoint_gives_back_every_bit():
    bank = Bank(2, terms=TERMS)
    cut = response(1, FinishReason.ABORTED, continued=((1, 2), (2, 3)))
    bank.keep((3, 0), Banked(cut))
    bank.keep((3, 1), Banked(response(2), Verdict(0.25, -1.0, Outcome.TIMEOUT, "late")))
    read = Bank(2)
    read.load_state(json.loads(json.dumps(bank.state())))
    assert read == bank
    assert read.take((3, 1)).verdict.outcome is Outcome.TIMEOUT
