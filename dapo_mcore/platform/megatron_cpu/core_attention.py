"""Causal self-attention for Megatron's local layer spec: packed sequences and context parallelism on a CPU.

Stands in for megatron.core's DotProductAttention, which refuses both. Only imported when megatron.core is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dapo_mcore.zigzag import Rows, causal_pieces, zigzag_positions


def take_rows(x: Tensor, limits: Sequence[Rows]) -> Sequence[Tensor]:
    """[b, heads, rows, d] -> the given rows of it, each [b, heads, stop - start, d]."""
    starts, stops = zip(*limits, strict=True)
    if starts == (0, *stops[:-1]) and stops[-1] == x.shape[-2]:  # the gradient of a slice would be as large as x
        return x.split([stop - start for start, stop in limits], -2)
    return [x[:, :, start:stop] for start, stop in limits]


class _GatherRows(torch.autograd.Function):
    """[n, ...] on each rank -> [size * n, ...] on all, rank after rank; the gradient is summed back to the owner."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        whole = local.new_empty(group.size() * local.shape[0], *local.shape[1:])
        dist.all_gather_into_tensor(whole, local.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        local = grad.new_empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(local, grad.contiguous(), group=ctx.group)
        return local, None


class CausalCoreAttention(MegatronModule):
    """Attends sequence by sequence, so no padded scores are computed.

    Under context parallelism every rank rebuilds all keys and values: exact, but meant for short sequences.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        if attention_type != "self" or config.window_size is not None or config.softmax_type != "vanilla":
            raise ValueError(
                f"layer {layer_number}: {attention_type} attention with window {config.window_size} and "
                f"{config.softmax_type} softmax; on a CPU only plain causal self-attention exists"
            )
        self.mask_type = attn_mask_type
        self.scale = softmax_scale or 1.0 / math.sqrt(cast(int, config.kv_channels))
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.cp: Any = parallel_state.get_context_parallel_group() if config.context_parallel_size > 1 else None

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
        """[t, heads, d] packed, or [s, b, heads, d] -> [t or s, b, heads * d], with b = 1 when packed.

        Key and value have the query groups' heads. Packed rows are this rank's, sequence after sequence in zigzag
        order; `packed_seq_params` holds the sequences' global limits, padded ones where there is padding.
        """
        mask_type = attn_mask_type or self.mask_type
        if mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal) or attention_mask is not None:
            raise ValueError(f"attention mask {mask_type}: on a CPU only causal attention without a mask exists")
        if query.dim() == 3:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        bounds = self._bounds(query.shape[0], packed_seq_params)
        size, rank = (1, 0) if self.cp is None else (self.cp.size(), self.cp.rank())
        if self.cp is not None:
            key, value = (self._whole(x, bounds) for x in (key, value))
        q, k, v = (x.movedim(0, -2) for x in (query, key, value))  # [b, heads, rows, d]
        own, seen = zip(*causal_pieces(bounds, size, rank), strict=True)
        pieces = zip(take_rows(q, own), take_rows(k, seen), take_rows(v, seen), strict=True)
        out = torch.cat([self._attend(*piece) for piece in pieces], -2)
        return out.movedim(-2, 0).flatten(-2)

    def _bounds(self, rows: int, packed: PackedSeqParams | None) -> list[int]:
        total = rows * (1 if self.cp is None else self.cp.size())
        if packed is None:
            return [0, total]
        padded = packed.cu_seqlens_q_padded
        bounds = (packed.cu_seqlens_q if padded is None else padded).tolist()
        if bounds[-1] != total:
            raise ValueError(f"{total} packed rows, but the sequences end at row {bounds[-1]}")
        return bounds

    def _whole(self, local: Tensor, bounds: list[int]) -> Tensor:
        """Every rank's rows, in the order of the sequences."""
        assert self.cp is not None
        size = self.cp.size()
        positions = torch.cat([zigzag_positions(bounds, size, rank) for rank in range(size)])
        return _GatherRows.apply(local, self.cp)[positions.argsort()]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One piece, [b, heads, rows, d]."""
        behind = k.shape[-2] - q.shape[-2]
        mask = None
        if behind:
            mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(behind)
        dropout = self.dropout if self.training else 0.0
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, mask is None, scale=self.scale, enable_gqa=gqa)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}  # no parameters, nothing to save
