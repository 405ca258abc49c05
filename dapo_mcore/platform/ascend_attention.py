"""Core attention on an NPU under context parallelism: packed sequences that ranks hold zigzag.

MindSpeed's own takes packed sequences cut into one consecutive block per rank, whatever the rank holds. Only imported
when megatron.core is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dapo_mcore.zigzag import Rows, causal_pieces, whole_rows

RIGHT_DOWN_CAUSAL = 3  # sparse mode: the last query of a piece sees all of its keys, the one before all but the last


@functools.cache
def triangle(device: torch.device) -> Tensor:
    """[2048, 2048] bool, True is masked: what npu_fusion_attention asks for, however long the sequences."""
    return torch.ones(2048, 2048, dtype=torch.bool, device=device).triu_(1)


class ZigzagAttention(MegatronModule):
    """Every rank gathers all keys and values; each of its chunks is then a sequence to the fused operator."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        if attention_type != "self" or attn_mask_type is not AttnMaskType.causal or config.attention_dropout:
            raise ValueError(
                f"layer {layer_number}: {attention_type} attention, {attn_mask_type}, dropout "
                f"{config.attention_dropout}; under context parallelism only plain causal self-attention exists"
            )
        self.scale = softmax_scale or 1.0 / math.sqrt(cast(int, config.kv_channels))
        self.cp = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """[t, heads, d] -> [t, heads * d]: this rank's rows, zigzag sequence after sequence, all sequences packed.

        Key and value have the query groups' heads; `packed_seq_params` holds the sequences' limits over all ranks.
        """
        import torch_npu  # pyright: ignore[reportMissingImports]

        assert packed_seq_params is not None
        bounds: list[int] = packed_seq_params.cu_seqlens_q.tolist()
        own, seen = zip(*causal_pieces(bounds, self.cp.size(), self.cp.rank()), strict=True)
        keys, values = (whole_rows(x, bounds, self.cp, seen) for x in (key, value))
        out = torch_npu.npu_fusion_attention(
            query,
            keys,
            values,
            query.shape[1],
            "TND",
            atten_mask=triangle(query.device),
            scale=self.scale,
            sparse_mode=RIGHT_DOWN_CAUSAL,
            actual_seq_qlen=_ends(own),
            actual_seq_kvlen=_ends(seen),
        )
        return out[0].flatten(-2)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}  # no parameters, nothing to save


def _ends(pieces: Sequence[Rows]) -> list[int]:
    """Of the pieces, laid one behind the other."""
    return list(accumulate(stop - start for start, stop in pieces))
