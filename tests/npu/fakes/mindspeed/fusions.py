"""Fused rope and fused permutation in the place of Megatron's functions, where the switches ask for them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from npu_operators import COMPILED
from torch import Tensor

Function = torch.autograd.Function


def replace(switches: dict[str, Any]) -> None:
    if switches.get("use_fused_rotary_pos_emb"):
        _fuse_rope()
    if switches.get("moe_permute_fusion"):
        _fuse_permutation()


def _everywhere(module: Any, name: str, replacement: Any) -> None:
    """In every module of Megatron that has taken the name from there."""
    original = getattr(module, name)
    for holder in [m for held, m in sys.modules.items() if held.startswith("megatron.core")]:
        if vars(holder).get(name) is original:
            setattr(holder, name, replacement)


def _fuse_rope() -> None:
    from megatron.core.models.common.embeddings import rope_utils

    route = rope_utils.apply_rotary_pos_emb

    def rotate(t: Tensor, freqs: Tensor, *_: Any, **__: Any) -> Tensor:
        cosines, sines = freqs.cos().to(t.dtype), freqs.sin().to(t.dtype)
        return COMPILED["npu_rotary_position_embedding"](t.contiguous(), cosines, sines, 0)

    def apply(t: Tensor, freqs: Tensor, config: Any, *args: Any, **kwargs: Any) -> Tensor:
        config.apply_rope_fusion = False  # Apex's, which there is none of
        return route(t, freqs, config, *args, **kwargs)

    rope_utils._apply_rotary_pos_emb_bshd = rotate
    _everywhere(rope_utils, "apply_rotary_pos_emb", apply)


class _Permute(Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, routing_map: Tensor, probs: Tensor, count: int) -> Any:
        options = {"probs": probs, "num_out_tokens": count}
        permuted = torch.ops.npu.npu_moe_token_permute_with_routing_map(tokens, routing_map, **options)
        ctx.routing_map, ctx.rows = routing_map, permuted[2]
        return permuted

    @staticmethod
    def backward(ctx: Any, grad: Tensor, probs_grad: Tensor, _: Any) -> Any:
        tokens, experts = ctx.routing_map.shape
        gradient = torch.ops.npu.npu_moe_token_permute_with_routing_map_grad
        given, probs = gradient(grad, probs_grad, ctx.rows, ctx.routing_map, experts, tokens, False)
        return given, None, probs, None


class _Unpermute(Function):
    @staticmethod
    def forward(ctx: Any, permuted: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
        ctx.rows, ctx.shape = rows, shape
        return torch.ops.npu._npu_moe_token_unpermute_with_routing_map(permuted, rows, shape)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gradient = torch.ops.npu.npu_moe_token_unpermute_with_routing_map_grad
        return gradient(grad, ctx.rows, ctx.rows, None, None, None, False, ctx.shape)[0], None, None


def _fuse_permutation() -> None:
    from megatron.core.transformer.moe import moe_utils

    sort = moe_utils.sort_chunks_by_idxs

    def permute(tokens: Tensor, routing_map: Tensor, probs: Tensor, num_out_tokens: int, **_: Any) -> Any:
        """Both as float32 where one of them is, which the operator wants alike."""
        wide = torch.promote_types(tokens.dtype, probs.dtype)
        permuted, shares, rows = _Permute.apply(tokens.to(wide), routing_map, probs.to(wide), num_out_tokens)
        return permuted.to(tokens.dtype), shares.to(tokens.dtype), rows

    def unpermute(permuted: Tensor, rows: Tensor, restore_shape: torch.Size, **_: Any) -> Any:
        return _Unpermute.apply(permuted, rows, restore_shape)

    _everywhere(moe_utils, "permute", permute)
    _everywhere(moe_utils, "unpermute", unpermute)
    _everywhere(moe_utils, "sort_chunks_by_idxs", lambda *args, fused, **options: sort(*args, **options))
