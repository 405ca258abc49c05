import math

import pytest
import torch

from dapo_mcore.algo.advantage import (
    group_advantages,
    leave_one_out_advantages,
    per_group,
    whitened_group_differences,
)


@pytest.mark.parametrize(
    ("rewards", "normalize_by_std", "ddof", "expected"),
    [
        ([1, -1, -1, -1], True, 1, [1.5, -0.5, -0.5, -0.5]),
        ([1, -1, -1, -1], True, 0, [math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3)]),
        ([1, -1, -1, -1], False, 1, [1.5, -0.5, -0.5, -0.5]),
        ([1, -1], True, 1, [math.sqrt(0.5), -math.sqrt(0.5)]),
        ([1, -1], True, 0, [1, -1]),
        ([1, 0, -2], False, 0, [4 / 3, 1 / 3, -5 / 3]),
        ([0, 3, 6], True, 1, [-1, 0, 1]),
    ],
)
def test_the_advantage_is_the_reward_relative_to_its_group(rewards, normalize_by_std, ddof, expected):
    advantages = group_advantages(torch.tensor(rewards, dtype=torch.float32), normalize_by_std, ddof)
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float32), rtol=3e-6, atol=0)


@pytest.mark.parametrize(("ddof", "expected"), [(0, -3.870), (1, -3.747)])
def test_the_deviation_blows_up_a_crumb_of_penalty(ddof, expected):
    rewards = torch.tensor([1.0] * 15 + [1 - 20 / 4096])
    assert group_advantages(rewards, True, ddof)[-1].item() == pytest.approx(expected, abs=4e-3)


def test_the_small_constant_is_added_outside_the_root():
    std = 1e-3 * math.sqrt(0.5)  # of two rewards 1e-3 apart, unbiased
    expected = 5e-4 / (std + 1e-6)
    rewards = torch.tensor([0.0, 1e-3], dtype=torch.float64)
    assert group_advantages(rewards)[1].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("by_std", [True, False])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 6, 7, 16])
@pytest.mark.parametrize("reward", [0.1, 0.7, -1.0])
def test_equal_rewards_give_exactly_zero(reward, size, by_std, ddof):
    advantages = group_advantages(torch.full((size,), reward), by_std, ddof)
    assert advantages.tolist() == [0.0] * size


@pytest.mark.parametrize("by_std", [True, False])
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order_of_the_rewards(by_std):
    rewards = torch.randn(16, generator=torch.Generator().manual_seed(0))
    advantages = group_advantages(rewards, by_std)
    assert advantages.dtype == torch.float32
    assert abs(advantages.double().sum().item()) < 1e-6
    assert advantages.argsort().tolist() == rewards.argsort().tolist()


@pytest.mark.parametrize(("name", "by_std"), [("std", True), ("mean", False)])
def test_advantages_are_those_of_verl(oracle, name, by_std):
    verl = oracle("verl")
    rewards, groups = verl["input.group.rewards"], verl["input.group.index"]
    ours = torch.cat([group_advantages(rewards[groups == i], by_std, ddof=1) for i in groups.unique()])
    torch.testing.assert_close(ours.double(), verl[f"advantage.{name}"], rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1, 0, 0, 0], [1, -1 / 3, -1 / 3, -1 / 3]),
        ([1, -1], [2, -2]),
        ([3, 0, 6], [0, -4.5, 4.5]),
        ([0.1] * 7, [0] * 7),
    ],
)
def test_leave_one_out_compares_with_the_mean_of_the_others(rewards, expected):
    advantages = leave_one_out_advantages(torch.tensor(rewards, dtype=torch.float32))
    assert advantages.tolist() == pytest.approx(expected, rel=1e-6)


def test_whitening_has_mean_0_and_deviation_1_over_the_trained_tokens_of_all_groups():
    rewards, groups = torch.tensor([1.0, 0.0, 5.0, 2.0, 2.0]), torch.tensor([0, 0, 7, 7, 7])
    tokens = torch.tensor([3, 1, 2, 0, 4])  # centred: 0.5, -0.5, 2, -1, -1
    advantages = whitened_group_differences(rewards, groups, tokens)
    mean = (3 * 0.5 - 0.5 + 2 * 2 - 4) / 10
    variance = (3 * (0.5 - mean) ** 2 + (-0.5 - mean) ** 2 + 2 * (2 - mean) ** 2 + 4 * (-1 - mean) ** 2) / 9
    expected = [(x - mean) / math.sqrt(variance) for x in (0.5, -0.5, 2, -1, -1)]
    assert advantages.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("tokens", [[0, 0], [1, 0]])
def test_nothing_to_whiten_gives_zeros(tokens):
    rewards, groups = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
    assert whitened_group_differences(rewards, groups, torch.tensor(tokens)).tolist() == [0, 0]


@pytest.mark.parametrize("estimate", [per_group(leave_one_out_advantages), whitened_group_differences])
def test_a_response_without_a_grade_counts_in_no_statistic(estimate):
    rewards, groups = torch.tensor([1.0, math.nan, 0.0, 4.0, 2.0]), torch.tensor([0, 0, 0, 1, 1])
    tokens, graded = torch.tensor([2, 0, 3, 1, 1]), torch.tensor([True, False, True, True, True])
    advantages = estimate(rewards, groups, tokens)
    assert advantages[1] == 0
    assert torch.equal(advantages[graded], estimate(rewards[graded], groups[graded], tokens[graded]))


@pytest.mark.parametrize(
    ("name", "estimate"),
    [("rloo", per_group(leave_one_out_advantages)), ("reinforce_plus_plus_baseline", whitened_group_differences)],
)
def test_the_other_estimators_are_those_of_verl(oracle, name, estimate):
    verl = oracle("verl")
    ours = estimate(verl["input.group.rewards"], verl["input.group.index"], verl["input.group.lengths"])
    torch.testing.assert_close(ours.double(), verl[f"advantage.{name}"], rtol=3e-7, atol=1e-7)
