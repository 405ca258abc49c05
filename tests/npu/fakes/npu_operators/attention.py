"""npu_fusion_attention: computes what it is asked, and refuses what nobody means to ask."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from npu_contract import require
from torch import Tensor

TRIANGLE = 2048
FULL, CAUSAL, RIGHT_DOWN_CAUSAL = 0, 2, 3


@dataclass(frozen=True)
class Record:
    layout: str
    has_mask: bool
    sparse_mode: int
    ends: tuple[int, ...]  # of the sequences


RECORDS: list[Record] = []


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    inner_precise: int = 0,
    prefix: list[int] | None = None,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    sparse_mode: int = 0,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """[T, heads, d] -> the same, sequence by sequence; what else it returns on a device is left empty."""
    require(head_num == query.shape[1], "head_num is the number of query heads")
    check_mask(atten_mask, sparse_mode)
    require(input_layout == "TND", "sequences are packed: layout TND")
    assert actual_seq_qlen is not None
    assert actual_seq_kvlen is not None
    rows, seen = limits(actual_seq_qlen, query.shape[0]), limits(actual_seq_kvlen, key.shape[0])
    require(sparse_mode == RIGHT_DOWN_CAUSAL or rows == seen, "queries and keys of self-attention are equally long")
    RECORDS.append(Record(input_layout, atten_mask is not None, sparse_mode, tuple(map(int, actual_seq_qlen))))
    pieces = []
    for (start, stop), (first, last) in zip(pairwise(rows), pairwise(seen), strict=True):
        q = query[start:stop].transpose(0, 1)[None]
        k, v = (x[first:last].transpose(0, 1)[None] for x in (key, value))
        visible = None
        if sparse_mode != FULL:
            visible = torch.ones(stop - start, last - first, dtype=torch.bool).tril(last - first - (stop - start))
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, visible, 1.0 - keep_prob, scale=scale, enable_gqa=gqa)
        pieces.append(out[0].transpose(0, 1))
    nothing = query.new_empty(0)
    return torch.cat(pieces), nothing, nothing, nothing, 0, 0, 0


def limits(ends: list[int], rows: int) -> list[int]:
    """With the leading 0 that a caller may leave out."""
    ends = [int(end) for end in ends]
    require(ends == sorted(ends) and ends[-1] == rows, "actual sequence lengths are rising ends, up to the last row")
    return ends if ends[0] == 0 else [0, *ends]


def check_mask(mask: Tensor | None, sparse_mode: int) -> None:
    """Full attention has neither mask nor mode, causal attention has both."""
    if mask is None:
        require(sparse_mode == FULL, f"full attention has sparse mode 0, not {sparse_mode} without a mask")
        return
    require(
        sparse_mode in (CAUSAL, RIGHT_DOWN_CAUSAL), f"a triangular mask goes with sparse mode 2 or 3, not {sparse_mode}"
    )
    require(mask.dtype is torch.bool and mask.shape == (TRIANGLE, TRIANGLE), "the causal mask is bool [2048, 2048]")
    require(bool(mask.triu(1).eq(mask).all() and mask.sum() == TRIANGLE * (TRIANGLE - 1) // 2), "True is masked")
