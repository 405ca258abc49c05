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
    *,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    actual_seq_qlen: Any = None,
    actual_seq_kvlen: Any = None,
    sparse_mode: int = 0,
    **_: Any,
) -> tuple[Tensor, ...]:
    """[T, heads, d] -> the same, sequence by sequence."""
    require(head_num == query.shape[1], "head_num is the number of query heads")
    check_mask(atten_mask, sparse_mode)
    require(input_layout == "TND", "sequences are packed: layout TND")
    ends, key_ends = ([int(end) for end in limits] for limits in (actual_seq_qlen, actual_seq_kvlen))
    require(sparse_mode == 3 or key_ends == ends, "queries and keys of self-attention have the same lengths")
    for name, limits, rows in (("q", ends, query.shape[0]), ("kv", key_ends, key.shape[0])):
        is_rising = limits == sorted(limits) and limits[-1] == rows
        require(is_rising, f"actual_seq_{name}len are rising ends, up to the last row")
    RECORDS.append(Record(input_layout, atten_mask is not None, sparse_mode, tuple(ends)))
    parts = []
    for own, seen in zip(sequences(ends), sequences(key_ends), strict=True):
        q, k, v = (x[rows].transpose(0, 1)[None] for x, rows in ((query, own), (key, seen), (value, seen)))
        behind = k.shape[-2] - q.shape[-2]  # keys before the first query
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(behind) if sparse_mode else None
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, mask, 1.0 - keep_prob, scale=scale, enable_gqa=gqa)
        parts.append(out[0].transpose(0, 1))
    return (torch.cat(parts),)


def sequences(ends: list[int]) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise(ends if ends[0] == 0 else [0, *ends])]


def check_mask(mask: Tensor | None, sparse_mode: int) -> None:
    """Full attention has neither mask nor mode, causal attention has both: 2, or 3 if the last query sees all keys."""
    if mask is None:
        require(sparse_mode == 0, f"full attention has sparse mode 0, not {sparse_mode} without a mask")
        return
    require(sparse_mode in (2, 3), f"a triangular mask goes with sparse mode 2 or 3, not {sparse_mode}")
    require(mask.dtype is torch.bool and mask.shape == (TRIANGLE, TRIANGLE), "the causal mask is bool [2048, 2048]")
    require(bool(mask.triu(1).eq(mask).all() and mask.sum() == TRIANGLE * (TRIANGLE - 1) // 2), "True is masked")
