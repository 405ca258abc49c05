"""Operators of torch.ops.npu that our code or MindSpeed's layers call, computed by torch under a device's rules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from npu_operators.attention import npu_fusion_attention
from npu_operators.cross_entropy import npu_cross_entropy_loss
from npu_operators.experts import (
    _npu_moe_token_unpermute_with_routing_map,
    npu_moe_token_permute_with_routing_map,
    npu_moe_token_permute_with_routing_map_grad,
    npu_moe_token_unpermute_with_routing_map_grad,
)
from npu_operators.layers import (
    npu_grouped_matmul,
    npu_rms_norm,
    npu_rotary_mul,
    npu_rotary_position_embedding,
    npu_swiglu,
)
from npu_operators.schemas import SCHEMAS

__all__ = ["CALLED", "COMPILED", "COMPUTED", "SCHEMAS"]

CALLED: set[str] = set()


def _noted(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        CALLED.add(function.__name__)
        return function(*args, **kwargs)

    return call


COMPILED = {"npu_rotary_position_embedding": _noted(npu_rotary_position_embedding)}  # by MindSpeed, of its own sources
COMPUTED: dict[str, Callable[..., Any]] = {
    function.__name__: _noted(function)
    for function in (
        npu_cross_entropy_loss,
        npu_fusion_attention,
        npu_rms_norm,
        npu_swiglu,
        npu_rotary_mul,
        npu_grouped_matmul,
        npu_moe_token_permute_with_routing_map,
        npu_moe_token_permute_with_routing_map_grad,
        _npu_moe_token_unpermute_with_routing_map,
        npu_moe_token_unpermute_with_routing_map_grad,
    )
}
