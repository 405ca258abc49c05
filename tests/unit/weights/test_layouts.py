import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_mcore.weights.layouts import Even, GateUp, GroupedQKV, VocabularyRows, Whole

SIZES = st.integers(1, 4)
RANKS = st.sampled_from([1, 2, 4])


@st.composite
def cut_layouts(draw):
    """A layout and a number of ranks that divides it."""
    ranks, a, b = draw(RANKS), draw(SIZES), draw(SIZES)
    vocab = draw(st.integers(1, ranks * a))
    groups = draw(st.sampled_from([1, 2, 4]))  # fewer, equally many, or more than ranks
    head_dim = ranks * a
    return ranks, draw(
        st.sampled_from(
            [
                Whole((a, b)),
                Whole((a,)),
                Even((ranks * a, b), dim=0),
                Even((a, ranks * b), dim=1),
                VocabularyRows(vocab, ranks * a, b),
                GroupedQKV(groups * b, groups, head_dim, (a,)),
                GroupedQKV(groups * b, groups, head_dim, ()),
                GateUp(ranks * a, b),
            ]
        )
    )


def bits(tensor):
    return tensor.contiguous().view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


def random_bits(shape, dtype, seed):
    """Any bit pattern, NaNs and infinities included."""
    integers = torch.int16 if dtype == torch.bfloat16 else torch.int32
    limits = torch.iinfo(integers)
    random = torch.Generator().manual_seed(seed)
    return torch.randint(limits.min, limits.max, shape, dtype=integers, generator=random).view(dtype)


@settings(deadline=None, max_examples=150)
@given(cut_layouts(), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 1000))
def test_conversion_and_cutting_are_undone_bit_for_bit(case, dtype, seed):
    ranks, layout = case
    tensors = [random_bits(shape, dtype, seed + i) for i, shape in enumerate(layout.hf_shapes)]
    full = layout.to_mcore(tensors)
    assert full.shape == layout.full_shape
    joined = layout.join([layout.cut(full, rank, ranks).clone() for rank in range(ranks)])
    assert torch.equal(bits(joined), bits(full))
    for back, tensor in zip(layout.to_hf(joined), tensors, strict=True):
        assert torch.equal(bits(back), bits(tensor))


@settings(deadline=None, max_examples=50)
@given(cut_layouts())
def test_a_rank_holds_its_share_of_a_cut_parameter_and_all_of_a_whole_one(case):
    ranks, layout = case
    full = torch.zeros(layout.full_shape)
    share = ranks if layout.is_cut else 1
    assert [layout.cut(full, rank, ranks).numel() * share for rank in range(ranks)] == [full.numel()] * ranks


def test_qkv_rows_are_the_query_heads_the_key_head_and_the_value_head_of_each_group():
    layout = GroupedQKV(heads=4, groups=2, head_dim=1, tail=())
    query, key, value = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([10.0, 20.0]), torch.tensor([100.0, 200.0])
    full = layout.to_mcore([query, key, value])
    assert full.tolist() == [1, 2, 10, 100, 3, 4, 20, 200]
    assert layout.cut(full, 1, 2).tolist() == [3, 4, 20, 200]


def test_the_only_group_is_cut_through_when_there_are_more_ranks():
    layout = GroupedQKV(heads=2, groups=1, head_dim=1, tail=())
    full = layout.to_mcore([torch.tensor([1.0, 2.0]), torch.tensor([10.0]), torch.tensor([100.0])])
    assert [layout.cut(full, rank, 2).tolist() for rank in range(2)] == [[1, 2], [10, 100]]


def test_a_rank_holds_its_part_of_gate_over_its_part_of_up():
    layout = GateUp(rows=2, columns=1)
    full = layout.to_mcore([torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0], [20.0]])])
    assert full.flatten().tolist() == [1, 2, 10, 20]
    assert layout.cut(full, 1, 2).flatten().tolist() == [2, 20]


def rows_in_vllm(layout, rank, size):
    """Which rows of which tensor a rank of vLLM holds, from top to bottom; None is padding."""
    shard = layout.vllm(rank, size)
    rows = [None] * shard.shape[0]
    for box in shard.boxes:
        for row in range(box.shape[0]):
            rows[box.at[0] + row] = (box.tensor, box.source[0] + row)
    return rows


def test_a_rank_of_vllm_holds_its_query_heads_then_its_key_heads_then_its_value_heads():
    layout = GroupedQKV(heads=4, groups=2, head_dim=1, tail=(3,))
    assert rows_in_vllm(layout, 1, 2) == [(0, 2), (0, 3), (1, 1), (2, 1)]
    assert rows_in_vllm(layout, 0, 1) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (2, 0), (2, 1)]


def test_ranks_of_vllm_share_a_key_head_when_they_are_more_than_there_are():
    layout = GroupedQKV(heads=4, groups=2, head_dim=1, tail=())
    assert [rows_in_vllm(layout, rank, 4) for rank in range(4)] == [
        [(0, 0), (1, 0), (2, 0)],
        [(0, 1), (1, 0), (2, 0)],
        [(0, 2), (1, 1), (2, 1)],
        [(0, 3), (1, 1), (2, 1)],
    ]


def test_vllm_pads_the_vocabulary_to_64_rows_whatever_megatron_does():
    layout = VocabularyRows(rows=66, padded=132, columns=2)
    assert rows_in_vllm(layout, 1, 2) == [(0, 64), (0, 65), *[None] * 62]
    assert rows_in_vllm(layout, 3, 4) == [None] * 32
    assert layout.mcore(1, 2).shape == (66, 2)


def test_vllm_refuses_heads_that_its_ranks_cannot_share():
    with pytest.raises(ValueError, match="24 query heads and 3 key-value heads over 8 ranks"):
        GroupedQKV(heads=24, groups=3, head_dim=1, tail=()).vllm(0, 8)


def test_what_is_one_rectangle_is_a_view_and_nothing_is_copied():
    gate_up, columns = GateUp(rows=4, columns=2), Even((4, 6), dim=1)
    full, wide = torch.ones(8, 2), torch.ones(4, 6)
    assert [half.data_ptr() for half in gate_up.to_hf(full)] == [full.data_ptr(), full[4:].data_ptr()]
    assert gate_up.cut(full, 0, 1).data_ptr() == full.data_ptr()
    assert columns.cut(wide, 1, 2).data_ptr() == wide[:, 3:].data_ptr()
    grouped = GroupedQKV(heads=4, groups=2, head_dim=1, tail=(3,))
    interleaved = torch.ones(grouped.full_shape)
    assert grouped.cut(interleaved, 1, 2).data_ptr() == interleaved[4:].data_ptr()


def test_vocabulary_is_padded_with_zero_rows_that_never_leave():
    layout = VocabularyRows(rows=3, padded=4, columns=2)
    full = layout.to_mcore([torch.ones(3, 2)])
    assert full.sum(1).tolist() == [2, 2, 2, 0]
    assert layout.to_hf(torch.full((4, 2), 7.0))[0].shape == (3, 2)


def test_a_size_that_does_not_divide_is_refused_with_shape_and_cure():
    with pytest.raises(ValueError, match=r"shape \[6, 2\] cannot be cut into 4 equal parts.*divides 6"):
        Even((6, 2), dim=0).cut(torch.zeros(6, 2), 0, 4)


def test_a_padded_vocabulary_below_the_real_one_is_refused():
    with pytest.raises(ValueError, match="100 rows cannot hold the model's 131"):
        VocabularyRows(rows=131, padded=100, columns=2)
