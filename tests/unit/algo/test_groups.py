import random
from itertools import count, islice

import pytest

from dapo_mcore.algo.groups import commit_in_order, graded_accuracies, is_mixed, passes_filter
from dapo_mcore.types import FinishReason, Group, Outcome, Prompt, Response, Sample, Verdict


def group_of(*verdicts: Verdict) -> Group:
    response = Response((7,), (-0.1,), "", FinishReason.STOP, 0)
    return Group(Prompt(0, 0, (1,), "", ""), tuple(Sample(response, verdict) for verdict in verdicts))


@pytest.mark.parametrize(
    ("accuracies", "mixed"),
    [
        ([0.0, 0.0, 0.0, 0.0], False),
        ([1.0, 1.0, 1.0, 1.0], False),
        ([1.0, 0.0, 0.0, 0.0], True),
        ([0.0] + [0.95] * 7, True),
        ([0.5, 0.5], False),  # strictly between the extremes, and still nothing to learn from
        ([0.1 + 0.2, 0.3], False),  # rounding is no difference
        ([1.0], False),
        ([], False),
    ],
)
def test_a_group_is_mixed_when_its_extremes_differ(accuracies, mixed):
    assert is_mixed(accuracies) is mixed


@pytest.mark.parametrize("accuracy", [0.1, 0.2, 0.7, 0.9])
@pytest.mark.parametrize("size", range(2, 17))
def test_equal_accuracies_are_never_mixed_whatever_rounding_makes_of_their_deviation(accuracy, size):
    assert not is_mixed([accuracy] * size)


WRONG, RIGHT = Verdict(0.0, -1.0), Verdict(1.0, 1.0)
TIMEOUT, ERROR = Verdict(0.0, 0.0, Outcome.TIMEOUT), Verdict(0.0, 0.0, Outcome.ERROR)


@pytest.mark.parametrize(
    ("verdicts", "passes"),
    [
        ((RIGHT, WRONG), True),
        ((RIGHT, RIGHT, TIMEOUT), False),
        ((RIGHT, WRONG, ERROR), True),
        ((TIMEOUT, ERROR), False),
        ((RIGHT, ERROR), False),
    ],
)
def test_a_response_that_could_not_be_graded_does_not_make_a_group_pass(verdicts, passes):
    assert passes_filter(group_of(*verdicts)) is passes


def test_the_filter_looks_at_accuracy_and_never_at_the_score():
    assert not passes_filter(group_of(Verdict(0.0, -1.0), Verdict(0.0, -2.0)))
    assert graded_accuracies(group_of(Verdict(0.25, -1.0), TIMEOUT)) == [0.25]


def sequential(passes: list[bool], wanted: int) -> tuple[list[int], int]:
    """Sampling one prompt after another: which prompts are accepted, and how many are consumed."""
    accepted = list(islice((i for i in range(len(passes)) if passes[i]), wanted))
    return accepted, accepted[-1] + 1


def test_the_commit_equals_sequential_sampling_in_whatever_order_groups_finish():
    chance = random.Random(0)
    for _ in range(3_000):
        passes = [chance.random() < chance.choice((0.2, 0.5, 0.9)) for _ in range(40)]
        wanted = chance.randint(1, 8)
        if sum(passes) < wanted:
            continue
        expected, consumed = sequential(passes, wanted)
        verdicts: dict[int, bool] = {}
        for position in chance.sample(range(40), 40):
            verdicts[position] = passes[position]
            commit = commit_in_order(verdicts, 0, wanted)
            decided = all(p in verdicts for p in range(consumed))
            assert (len(commit.accepted) == wanted) == decided
            assert commit == (expected, consumed) or not decided
            assert commit.accepted == expected[: len(commit.accepted)]


def test_consecutive_steps_read_the_stream_without_gaps_or_repeats():
    chance = random.Random(1)
    passes = {position: chance.random() < 0.4 for position in range(500)}
    cursor, trained = 0, []
    for _ in range(10):
        accepted, cursor = commit_in_order(passes, cursor, 12)
        trained += accepted
    assert trained == list(islice((p for p in count() if passes[p]), 120))


def test_what_passed_so_far_is_committed_up_to_the_first_undecided_prompt():
    verdicts = {5: True, 6: False, 7: True, 9: True}
    assert commit_in_order(verdicts, 5, wanted=3) == ([5, 7], 8)


def test_prompts_behind_the_last_committed_one_stay_unread():
    assert commit_in_order({0: True, 1: True, 2: False, 3: True}, 0, wanted=2) == ([0, 1], 2)
    assert commit_in_order({0: True}, 0, wanted=0) == ([], 0)
