"""Attention of the CPU's layer spec against plain float64 softmax attention, written out."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dapo_mcore.platform import adapt_megatron

adapt_megatron()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402

from dapo_mcore.platform.megatron_cpu.core_attention import CausalCoreAttention  # noqa: E402
from dapo_mcore.zigzag import causal_pieces, zigzag_positions  # noqa: E402

HEADS, GROUPS, WIDTH = 4, 2, 8


def attention(**options: Any) -> CausalCoreAttention:
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=HEADS, num_query_groups=GROUPS, kv_channels=WIDTH,
        attention_dropout=0.0, **options,
    )  # fmt: skip
    return CausalCoreAttention(config, 1, AttnMaskType.causal, "self")


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[t, heads, d] of one sequence -> [t, heads * d], float64."""
    k, v = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / WIDTH**0.5
    scores = scores.masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)


def random_qkv(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(rows)
    shapes = ((rows, HEADS, WIDTH), (rows, GROUPS, WIDTH), (rows, GROUPS, WIDTH))
    return tuple(torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)  # type: ignore[return-value]


def packed(bounds: list[int]) -> PackedSeqParams:
    limits = torch.tensor(bounds, dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=limits, cu_seqlens_kv=limits)


@pytest.mark.parametrize("bounds", [[0, 7], [0, 1, 2], [0, 5, 6, 20, 31]])
def test_packed_sequences_do_not_see_each_other(bounds: list[int]) -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(bounds[-1]))
    found = attention()(q, k, v, None, packed_seq_params=packed(bounds))
    parts = [plain_attention(q[a:b], k[a:b], v[a:b]) for a, b in pairwise(bounds)]
    expected = torch.cat(parts)
    torch.testing.assert_close(found.squeeze(1), expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    mine = torch.autograd.grad((found.squeeze(1) * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_an_unpacked_batch_is_one_causal_sequence_per_column() -> None:
    q, k, v = (x.unflatten(0, (6, 3)) for x in random_qkv(18))  # [s, b, heads, d]
    found = attention()(q, k, v, None)
    expected = torch.stack([plain_attention(q[:, b], k[:, b], v[:, b]) for b in range(3)], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_rows_outside_the_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="10 packed rows, but the sequences end at row 8"):
        attention()(*random_qkv(10), None, packed_seq_params=packed([0, 3, 8]))


def test_an_attention_mask_is_refused_instead_of_ignored() -> None:
    with pytest.raises(ValueError, match="only causal attention without a mask"):
        attention()(*random_qkv(4), torch.zeros(1, 1, 4, 4).bool())


def test_a_sliding_window_is_refused_when_the_layer_is_built() -> None:
    with pytest.raises(ValueError, match=r"window \(4, 0\)"):
        attention(window_size=(4, 0))


chunk_counts = st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any)


def bounds_of(chunks: list[int], size: int) -> list[int]:
    bounds = [0]
    for count in chunks:
        bounds.append(bounds[-1] + 2 * size * count)
    return bounds


@settings(max_examples=50, deadline=None)
@given(chunks=chunk_counts, size=st.integers(2, 4))
def test_every_position_lives_on_exactly_one_context_parallel_rank(chunks: list[int], size: int) -> None:
    bounds = bounds_of(chunks, size)
    owned = [zigzag_positions(bounds, size, rank) for rank in range(size)]
    assert sorted(torch.cat(owned).tolist()) == list(range(bounds[-1]))
    assert len({len(positions) for positions in owned}) == 1


@settings(max_examples=50, deadline=None)
@given(chunks=chunk_counts, size=st.integers(1, 4))
def test_the_pieces_of_all_ranks_are_the_causal_triangles(chunks: list[int], size: int) -> None:
    bounds = bounds_of(chunks, size)
    seen = torch.zeros(bounds[-1], bounds[-1], dtype=torch.int64)
    for rank in range(size):
        positions = zigzag_positions(bounds, size, rank) if size > 1 else torch.arange(bounds[-1])
        for (first, last), (start, stop) in causal_pieces(bounds, size, rank):
            for back, row in enumerate(reversed(range(first, last))):
                seen[positions[row], start : stop - back] += 1
    expected = torch.zeros_like(seen)
    for start, stop in pairwise(bounds):
        expected[start:stop, start:stop] = torch.ones(stop - start, stop - start).tril().long()
    assert torch.equal(seen, expected)


def test_the_module_brings_nothing_into_a_checkpoint() -> None:
    assert attention().sharded_state_dict(prefix="layer.") == {}
    assert list(attention().parameters()) == []


def test_dropout_is_the_layers_own() -> None:
    module = CausalCoreAttention(attention().config, 1, AttnMaskType.causal, "self", attention_dropout=0.5)
    q, k, v = random_qkv(16)
    torch.manual_seed(0)
    dropped = module.train()(q, k, v, None, packed_seq_params=packed([0, 16]))
    kept = module.eval()(q, k, v, None, packed_seq_params=packed([0, 16]))
    assert not torch.allclose(dropped, kept)
    torch.testing.assert_close(kept.squeeze(1), plain_attention(q, k, v), rtol=1e-12, atol=1e-12)
