"""How responses become micro-batches."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dapo_mcore.actor.packing import deal, pack
from dapo_mcore.types import TrainBatch

CPU = torch.device("cpu")
lengths_lists = st.lists(st.integers(1, 100), max_size=30)


def batch(prompts: list[list[int]], responses: list[list[int]]) -> TrainBatch:
    n = sum(map(len, responses))
    return TrainBatch(
        token_ids=torch.tensor([t for p, r in zip(prompts, responses, strict=True) for t in (*p, *r)]),
        prompt_lengths=torch.tensor([len(p) for p in prompts]),
        response_lengths=torch.tensor([len(r) for r in responses]),
        loss_mask=torch.ones(n, dtype=torch.bool),
        advantages=torch.zeros(n),
        rollout_logprobs=torch.zeros(n),
    )


THREE = batch([[10, 11], [20], [30, 31, 32]], [[12, 13, 14], [21, 22], [33]])
ALL = torch.ones(6, dtype=torch.bool)


@given(lengths=lengths_lists, ranks=st.integers(1, 5), budget=st.integers(1, 120))
def test_every_sequence_is_dealt_exactly_once(lengths: list[int], ranks: int, budget: int) -> None:
    dealt = deal(lengths, ranks, budget)
    assert sorted(i for rank in dealt for micro_batch in rank for i in micro_batch) == list(range(len(lengths)))


@given(lengths=lengths_lists, ranks=st.integers(1, 5), budget=st.integers(1, 120))
def test_all_ranks_have_the_same_number_of_micro_batches_and_at_least_one(
    lengths: list[int], ranks: int, budget: int
) -> None:
    counts = {len(rank) for rank in deal(lengths, ranks, budget)}
    assert len(counts) == 1
    assert counts.pop() >= 1


@given(lengths=lengths_lists, ranks=st.integers(1, 5), budget=st.integers(1, 120))
def test_a_micro_batch_above_the_budget_is_a_single_sequence(lengths: list[int], ranks: int, budget: int) -> None:
    for micro_batch in (m for rank in deal(lengths, ranks, budget) for m in rank):
        assert sum(lengths[i] for i in micro_batch) <= budget or len(micro_batch) == 1


@given(lengths=lengths_lists, ranks=st.integers(1, 5))
def test_ranks_differ_by_at_most_the_longest_sequence(lengths: list[int], ranks: int) -> None:
    loads = [sum(lengths[i] for m in rank for i in m) for rank in deal(lengths, ranks, 1000)]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_a_rank_without_work_runs_empty_micro_batches() -> None:
    assert deal([50], 2, 40) == [[[0]], [[]]]
    assert deal([75, 32, 23, 22, 14], 2, 40) == [[[0], [4], []], [[1], [2], [3]]]


def test_dealing_does_not_depend_on_anything_but_the_lengths() -> None:
    lengths = [7, 7, 7, 30, 7, 30]
    assert deal(lengths, 2, 40) == deal(list(lengths), 2, 40) == [[[0, 3], [2]], [[1, 5], [4]]]


def test_a_micro_batch_holds_whole_sequences_end_to_end() -> None:
    packed = pack(THREE, [0, 2], ALL, 1, CPU)
    assert packed.input_ids.tolist() == [[10, 11, 12, 13, 14, 30, 31, 32, 33]]
    assert packed.packed.cu_seqlens_q.tolist() == [0, 5, 9]
    assert packed.packed.cu_seqlens_q.dtype == torch.int32
    assert packed.packed.max_seqlen_q == 5


def test_each_response_token_is_predicted_by_the_row_before_it() -> None:
    packed = pack(THREE, [0, 2], ALL, 1, CPU)
    assert packed.targets.tolist() == [12, 13, 14, 33]
    assert packed.rows.tolist() == [1, 2, 3, 7]
    assert packed.input_ids[0][packed.rows + 1].tolist() == packed.targets.tolist()
    assert packed.tokens.tolist() == [0, 1, 2, 5]


def test_unwanted_tokens_reach_the_model_but_not_the_head() -> None:
    wanted = torch.tensor([True, False, True, True, False, False])
    packed = pack(THREE, [0, 1, 2], wanted, 1, CPU)
    assert packed.input_ids.shape == (1, 12)
    assert packed.targets.tolist() == [12, 14, 21]
    assert packed.tokens.tolist() == [0, 2, 3]


def test_the_filler_is_a_sequence_of_its_own() -> None:
    packed = pack(THREE, [0], ALL, 4, CPU)
    assert packed.input_ids.tolist() == [[10, 11, 12, 13, 14, 0, 0, 0]]
    assert packed.packed.cu_seqlens_q.tolist() == [0, 5, 8]
    assert packed.targets.tolist() == [12, 13, 14]


def test_an_empty_micro_batch_still_has_a_token_per_tensor_parallel_rank() -> None:
    packed = pack(THREE, [], ALL, 2, CPU)
    assert packed.input_ids.tolist() == [[0, 0]]
    assert packed.packed.cu_seqlens_q.tolist() == [0, 2]
    assert len(packed.rows) == len(packed.targets) == len(packed.tokens) == 0
