"""Which rank computes what: balance by cost, whole sequences, equal numbers of micro-batches."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_mcore.actor.balance import deal, sequence_cost

lengths_lists = st.lists(st.integers(1, 100), max_size=30)


def tokens(length: int) -> float:
    return float(length)


def squared(length: int) -> float:
    return length + length**2 / 50


def architecture(**sizes: Any) -> Any:
    """The entries of a TransformerConfig that the cost reads."""
    qwen3_30b_a3b = {"num_layers": 48, "hidden_size": 2048, "num_attention_heads": 32, "num_query_groups": 4,
                     "kv_channels": 128, "ffn_hidden_size": 6144, "num_moe_experts": 128, "moe_router_topk": 8,
                     "moe_ffn_hidden_size": 768, "moe_layer_freq": [1] * 48}  # fmt: skip
    return SimpleNamespace(**{**qwen3_30b_a3b, **sizes})


@given(lengths=lengths_lists, ranks=st.integers(1, 5), budget=st.integers(1, 120))
def test_every_sequence_is_dealt_exactly_once(lengths: list[int], ranks: int, budget: int) -> None:
    dealt = deal(lengths, ranks, budget, squared).shares
    assert sorted(i for rank in dealt for micro_batch in rank for i in micro_batch) == list(range(len(lengths)))


@given(lengths=lengths_lists, ranks=st.integers(1, 5), budget=st.integers(1, 120), multiple=st.integers(1, 4))
def test_all_ranks_have_the_same_number_of_micro_batches_a_multiple_of_what_is_asked_for(
    lengths: list[int], ranks: int, budget: int, multiple: int
) -> None:
    (count,) = {len(rank) for rank in deal(lengths, ranks, budget, squared, multiple).shares}
    assert count >= 1
    assert count % multiple == 0


@given(lengths=lengths_lists, ranks=st.integers(1, 5), budget=st.integers(1, 120))
def test_a_micro_batch_above_the_budget_is_a_single_sequence(lengths: list[int], ranks: int, budget: int) -> None:
    for micro_batch in (m for rank in deal(lengths, ranks, budget, squared).shares for m in rank):
        assert sum(lengths[i] for i in micro_batch) <= budget or len(micro_batch) == 1


@given(lengths=lengths_lists, ranks=st.integers(1, 5))
def test_ranks_differ_by_at_most_the_heaviest_sequence(lengths: list[int], ranks: int) -> None:
    costs = deal(lengths, ranks, 1000, squared).costs
    assert max(costs) - min(costs) <= squared(max(lengths, default=0)) * (1 + 1e-9)


@given(lengths=lengths_lists, ranks=st.integers(1, 5), budget=st.integers(1, 120))
def test_the_costs_are_those_of_the_sequences_dealt(lengths: list[int], ranks: int, budget: int) -> None:
    dealt = deal(lengths, ranks, budget, squared)
    for share, cost in zip(dealt.shares, dealt.costs, strict=True):
        assert cost == pytest.approx(sum(squared(lengths[i]) for micro_batch in share for i in micro_batch))


@given(lengths=lengths_lists, ranks=st.integers(1, 5), budget=st.integers(1, 120))
def test_the_heaviest_micro_batches_come_first_on_every_rank(lengths: list[int], ranks: int, budget: int) -> None:
    for rank in deal(lengths, ranks, budget, squared).shares:
        costs = [sum(squared(lengths[i]) for i in micro_batch) for micro_batch in rank]
        assert all(a >= b * (1 - 1e-9) for a, b in pairwise(costs))


def test_a_rank_without_work_runs_empty_micro_batches() -> None:
    assert deal([50], 2, 40, tokens).shares == [[[0]], [[]]]
    assert deal([75, 32, 23, 22, 14], 2, 40, tokens).shares == [[[0], [4], []], [[1], [2], [3]]]


def test_micro_batches_of_a_rank_have_like_costs_where_the_budget_allows() -> None:
    assert deal([30, 10, 10, 10, 20, 20], 1, 50, tokens).shares == [[[0, 1, 2], [3, 4, 5]]]


def test_dealing_does_not_depend_on_anything_but_the_lengths() -> None:
    lengths = [7, 7, 7, 30, 7, 30]
    assert deal(lengths, 2, 40, tokens) == deal(list(lengths), 2, 40, tokens)


def test_a_long_sequence_weighs_more_than_its_tokens() -> None:
    lengths = [100, 60, 60, 60]
    assert deal(lengths, 2, 400, tokens).shares == [[[0, 3]], [[1, 2]]]
    assert deal(lengths, 2, 400, squared).shares == [[[0]], [[1, 2, 3]]]


def log_normal_lengths(seed: int, count: int = 512, mean: int = 1000, longest: int = 16_000) -> list[int]:
    """Heavy-tailed, sigma 1: one in twenty is above three times the mean."""
    draw = random.Random(seed)
    return [min(longest, math.ceil(draw.lognormvariate(math.log(mean) - 0.5, 1.0))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_heavy_tailed_lengths_leave_ranks_within_5_percent(seed: int) -> None:
    lengths = log_normal_lengths(seed)
    cost = sequence_cost(architecture(), vocab_size=151_936)
    dealt = deal(lengths, 16, 16_384, cost)
    assert max(dealt.costs) <= 1.05 * dealt.mean_cost
    assert sum(dealt.costs) == pytest.approx(sum(map(cost, lengths)))


def test_dealing_in_order_would_not() -> None:
    """The distribution is hard enough for the test above to mean something."""
    lengths = log_normal_lengths(0)
    cost = sequence_cost(architecture(), vocab_size=151_936)
    in_order = [sum(map(cost, lengths[rank::16])) for rank in range(16)]
    assert max(in_order) > 1.2 * sum(in_order) / 16


def test_the_cost_of_qwen3_30b_a3b_is_two_flops_per_active_weight_and_token() -> None:
    """3.3e9 active parameters, of which 0.3e9 only look a token up; attention is small at one token."""
    cost = sequence_cost(architecture(), vocab_size=151_936)
    assert cost(1) == pytest.approx(2 * 3.03e9, rel=0.02)


def test_attention_adds_a_score_and_a_weighted_value_for_half_the_pairs() -> None:
    """48 layers x 32 heads x 128 wide: 4 FLOPs each per pair, half of the pairs masked."""
    cost = sequence_cost(architecture(), vocab_size=151_936)
    quadratic = cost(2000) - 2 * cost(1000)
    assert quadratic == pytest.approx(2 * 48 * 32 * 128 * (2000**2 - 2 * 1000**2))


def test_dense_layers_cost_their_own_width() -> None:
    dense = sequence_cost(architecture(num_moe_experts=None), vocab_size=0)
    mixed = sequence_cost(architecture(moe_layer_freq=[0] * 47 + [1]), vocab_size=0)
    assert dense(1) == pytest.approx(mixed(1), rel=1e-9)  # 8 experts of 768 are as wide as 6144
    assert sequence_cost(architecture(moe_router_topk=4), vocab_size=0)(1) < dense(1)


def test_images_weigh_beside_the_tokens() -> None:
    assert deal([10, 10, 20], 2, 50, tokens).shares == [[[2]], [[0, 1]]]
    assert deal([10, 10, 20], 2, 50, tokens, images=[30.0, 0.0, 0.0]).shares == [[[0]], [[1, 2]]]
