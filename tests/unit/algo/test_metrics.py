import math

import pytest

from dapo_mcore.algo.metrics import filter_metrics, response_metrics, reward_metrics
from dapo_mcore.types import FinishReason, Group, Outcome, Prompt, Response, Sample, Verdict

RIGHT, WRONG = Verdict(1.0, 1.0), Verdict(0.0, -1.0)
TIMEOUT, ERROR = Verdict(0.0, 0.0, Outcome.TIMEOUT), Verdict(0.0, 0.0, Outcome.ERROR)


def group(*samples: tuple[int, Verdict], prompt_length: int = 3, cut_at: int = 9) -> Group:
    """Responses of the given lengths; those of length `cut_at` are truncated."""
    return Group(
        Prompt(0, 0, (1,) * prompt_length, "", ""),
        tuple(
            Sample(
                Response((7,) * n, (-0.1,) * n, "", FinishReason.LENGTH if n == cut_at else FinishReason.STOP, 0),
                verdict,
            )
            for n, verdict in samples
        ),
    )


GROUPS = [
    group((2, RIGHT), (4, WRONG), (9, WRONG), (1, TIMEOUT), prompt_length=3),
    group((2, RIGHT), (2, RIGHT), (2, RIGHT), (9, ERROR), prompt_length=5),
    group((3, WRONG), (3, WRONG), (3, WRONG), (3, WRONG), prompt_length=1),
    group((3, ERROR), (3, ERROR), (3, ERROR), (3, ERROR), prompt_length=1),
]


def test_rewards_are_averaged_over_the_responses_that_could_be_graded():
    metrics = {name: ratio.value for name, ratio in reward_metrics(GROUPS).items()}
    assert metrics == pytest.approx(
        {"reward/accuracy": 4 / 10, "reward/score": -2 / 10, "reward/timeouts": 1, "reward/errors": 5}
    )


def test_lengths_count_every_response_and_truncation_is_what_the_engine_says():
    metrics = {name: ratio.value for name, ratio in response_metrics(GROUPS).items()}
    assert metrics == pytest.approx(
        {
            "rollout/prompt_length": 10 / 4,
            "rollout/response_length": 55 / 16,
            "rollout/response_length_min": 1,
            "rollout/response_length_max": 9,
            "rollout/truncated_fraction": 2 / 16,
        }
    )


def test_solved_stuck_and_ungraded_groups_are_told_apart():
    metrics = {name: ratio.value for name, ratio in filter_metrics(GROUPS).items()}
    assert metrics == {
        "rollout/pass_rate": 1 / 4,
        "rollout/all_right_fraction": 1 / 4,
        "rollout/all_wrong_fraction": 1 / 4,
    }


def test_two_halves_add_up_to_the_metrics_of_the_whole():
    def add(name: str) -> float:
        return (reward_metrics(GROUPS[:1])[name] + reward_metrics(GROUPS[1:])[name]).value

    assert add("reward/accuracy") == reward_metrics(GROUPS)["reward/accuracy"].value


def test_no_groups_give_no_numbers_instead_of_zeros():
    assert math.isnan(reward_metrics([])["reward/accuracy"].value)
    assert math.isnan(filter_metrics([])["rollout/pass_rate"].value)
