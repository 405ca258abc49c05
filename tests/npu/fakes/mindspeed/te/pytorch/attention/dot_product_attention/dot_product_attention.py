"""Core attention. What a layer says about its mask counts only where no mask is given and the layer is causal."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch_npu
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from npu_contract import require
from torch import Tensor


class TEDotProductAttention(MegatronModule):
    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        rule = "rank r of MindSpeed's context parallelism holds the r-th part of all packed tokens, not of each"
        require(config.context_parallel_size == 1, rule)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        """[t, heads, d] -> [t, heads * d]."""
        mask = attention_mask
        if mask is None and attn_mask_type is AttnMaskType.causal:
            mask = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
        ends = packed_seq_params.cu_seqlens_q.tolist()  # with the leading 0
        out = torch_npu.npu_fusion_attention(
            query,
            key,
            value,
            query.shape[1],
            "TND",
            atten_mask=mask,
            scale=self.scale,
            actual_seq_qlen=ends,
            actual_seq_kvlen=ends,
            sparse_mode=2 if self.config.attention_mask_type == "causal" else 0,
        )
        return out[0].flatten(-2)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}
