"""Causal self-attention over packed sequences that are cut zigzag over context-parallel ranks.

MindSpeed's own (kvallgather_cp_algo) takes rank r's tokens for the r-th part of all packed tokens, while Megatron's
rotary embedding and our packing cut every sequence zigzag. Only imported when megatron.core is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast

import torch
import torch_npu  # pyright: ignore[reportMissingImports]
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dapo_mcore.zigzag import Rows, causal_pieces, whole_rows

TRIANGLE = 2048  # rows and columns of the mask that stands for one of any size
LAST_SEES_ALL = 3  # sparse mode: the triangle ends at the last query and the last key


class ZigzagAttention(MegatronModule):
    """Every rank gathers all keys and values, and attends with its two chunks of each sequence in one fused call."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        assert (attn_mask_type, attention_type) == (AttnMaskType.causal, "self")
        self.scale = softmax_scale or 1.0 / math.sqrt(cast(int, config.kv_channels))
        self.group: Any = parallel_state.get_context_parallel_group()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        """[t, heads, d] -> [t, heads * d]; key and value have the query groups' heads.

        Rows are this rank's, sequence after sequence in zigzag order; `packed_seq_params` holds the sequences' global
        limits.
        """
        assert packed_seq_params is not None
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        own, seen = zip(*causal_pieces(bounds, self.group.size(), self.group.rank()), strict=True)
        rows = torch.cat([torch.arange(start, stop) for start, stop in seen]).to(key.device)
        key, value = (whole_rows(x, bounds, self.group)[rows] for x in (key, value))
        return torch_npu.npu_fusion_attention(
            query,
            key,
            value,
            query.shape[1],
            "TND",
            atten_mask=_triangle(query.device),
            scale=self.scale,
            actual_seq_qlen=_ends(own),
            actual_seq_kvlen=_ends(seen),
            sparse_mode=LAST_SEES_ALL,
        )[0].flatten(-2)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}  # no parameters, nothing to save


@functools.cache
def _triangle(device: torch.device) -> Tensor:
    """True where a query must not look."""
    return torch.ones(TRIANGLE, TRIANGLE, dtype=torch.bool, device=device).triu(1)


def _ends(pieces: Sequence[Rows]) -> list[int]:
    return list(accumulate(stop - start for start, stop in pieces))
