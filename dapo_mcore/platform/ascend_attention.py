"""Core attention on an NPU under context parallelism: packed sequences that ranks hold zigzag.

MindSpeed's own takes packed sequences cut into one consecutive block per rank, whatever the rank holds. Only imported
when megatron.core is.
"""

from __future__ import annotations

import functools
import math
from itertools import accumulate
from typing import Any, cast

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dapo_mcore.zigzag import causal_pieces, zigzag_positions

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
        pieces = causal_pieces(bounds, self.cp.size(), self.cp.rank())
        places = self._places(bounds)
        seen = torch.cat([places[start:stop] for _, (start, stop) in pieces]).to(key.device)
        keys, values = (self._of_all_ranks(x).index_select(0, seen) for x in (key, value))
        out = torch_npu.npu_fusion_attention(
            query,
            keys,
            values,
            query.shape[1],
            "TND",
            atten_mask=triangle(query.device),
            scale=self.scale,
            sparse_mode=RIGHT_DOWN_CAUSAL,
            actual_seq_qlen=list(accumulate(stop - start for (start, stop), _ in pieces)),
            actual_seq_kvlen=list(accumulate(stop - start for _, (start, stop) in pieces)),
        )
        return out[0].flatten(-2)

    def _places(self, bounds: list[int]) -> Tensor:
        """[T] int64: where each position of the packed sequences lies when the ranks' rows follow one another."""
        return torch.cat([zigzag_positions(bounds, self.cp.size(), rank) for rank in range(self.cp.size())]).argsort()

    def _of_all_ranks(self, local: Tensor) -> Tensor:
        """[t, heads, d] -> [T, heads, d], rank after rank; gradients are summed back to the owner."""
        return tensor_parallel.gather_from_sequence_parallel_region(local, True, self.cp)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}  # no parameters, nothing to save
