"""How responses become micro-batches."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dapo_mcore.actor.packing import Cut, MicroBatch, pack
from dapo_mcore.types import TrainBatch

CPU = torch.device("cpu")
WHOLE = Cut()


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


def test_a_micro_batch_holds_whole_sequences_end_to_end() -> None:
    packed = pack(THREE, [0, 2], ALL, WHOLE, CPU)
    assert packed.input_ids.tolist() == [[10, 11, 12, 13, 14, 30, 31, 32, 33]]
    assert packed.packed.cu_seqlens_q.tolist() == [0, 5, 9]
    assert packed.packed.cu_seqlens_q.dtype == torch.int32
    assert packed.packed.max_seqlen_q == 5


def test_each_response_token_is_predicted_by_the_row_before_it() -> None:
    packed = pack(THREE, [0, 2], ALL, WHOLE, CPU)
    assert packed.targets.tolist() == [12, 13, 14, 33]
    assert packed.rows.tolist() == [1, 2, 3, 7]
    assert packed.input_ids[0][packed.rows + 1].tolist() == packed.targets.tolist()
    assert packed.tokens.tolist() == [0, 1, 2, 5]


def test_unwanted_tokens_reach_the_model_but_not_the_head() -> None:
    wanted = torch.tensor([True, False, True, True, False, False])
    packed = pack(THREE, [0, 1, 2], wanted, WHOLE, CPU)
    assert packed.input_ids.shape == (1, 12)
    assert packed.targets.tolist() == [12, 14, 21]
    assert packed.tokens.tolist() == [0, 2, 3]


def test_the_filler_is_a_sequence_of_its_own() -> None:
    packed = pack(THREE, [0], ALL, Cut(sequence_size=4), CPU)
    assert packed.input_ids.tolist() == [[10, 11, 12, 13, 14, 0, 0, 0]]
    assert packed.packed.cu_seqlens_q.tolist() == [0, 5, 8]
    assert packed.targets.tolist() == [12, 13, 14]


def test_an_empty_micro_batch_still_has_a_token_per_tensor_parallel_rank() -> None:
    packed = pack(THREE, [], ALL, Cut(sequence_size=2), CPU)
    assert packed.input_ids.tolist() == [[0, 0]]
    assert packed.packed.cu_seqlens_q.tolist() == [0, 2]
    assert len(packed.rows) == len(packed.targets) == len(packed.tokens) == 0


def on_context_ranks(sequences: list[int], size: int, tensor: int = 1) -> list[MicroBatch]:
    return [pack(THREE, sequences, ALL, Cut(size, rank, tensor), CPU) for rank in range(size)]


def test_context_ranks_hold_the_first_and_last_chunks_in_zigzag() -> None:
    """Lengths 5, 3 and 4 in chunks of 2, 1 and 1: rank 0 has chunks 0 and 3 of each sequence, rank 1 has 1 and 2."""
    first, second = on_context_ranks([0, 1, 2], 2)
    assert first.packed.cu_seqlens_q.tolist() == second.packed.cu_seqlens_q.tolist() == [0, 8, 12, 16]
    assert first.input_ids.tolist() == [[10, 11, 0, 0, 20, 0, 30, 33]]
    assert second.input_ids.tolist() == [[12, 13, 14, 0, 21, 22, 31, 32]]


def test_targets_are_found_before_the_cut() -> None:
    """Position 1 of the first sequence lies on rank 0, the token it predicts on rank 1."""
    first, second = on_context_ranks([0, 1, 2], 2)
    assert (first.rows.tolist(), first.targets.tolist(), first.tokens.tolist()) == ([1, 4], [12, 21], [0, 3])
    assert (second.rows.tolist(), second.targets.tolist()) == ([0, 1, 4, 7], [13, 14, 22, 33])
    assert second.tokens.tolist() == [1, 2, 4, 5]


@given(
    sequences=st.permutations([0, 1, 2]).flatmap(lambda p: st.integers(0, 3).map(lambda n: p[:n])),
    size=st.integers(2, 4),
    tensor=st.sampled_from([1, 2, 3]),
)
def test_every_wanted_token_is_on_one_context_rank_and_all_ranks_hold_as_much(
    sequences: list[int], size: int, tensor: int
) -> None:
    ranks = on_context_ranks(sequences, size, tensor)
    whole = pack(THREE, sequences, ALL, WHOLE, CPU)
    assert sorted(t for rank in ranks for t in rank.tokens.tolist()) == sorted(whole.tokens.tolist())
    assert len({rank.input_ids.shape for rank in ranks}) == 1
    assert ranks[0].input_ids.shape[1] % tensor == 0
    assert (ranks[0].packed.cu_seqlens_q.diff() % (2 * size)).eq(0).all()
    predicted = dict(zip(whole.tokens.tolist(), whole.targets.tolist(), strict=True))
    for rank in ranks:
        assert rank.targets.tolist() == [predicted[t] for t in rank.tokens.tolist()]
