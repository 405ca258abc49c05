"""Operators of torch.ops.npu that our code or MindSpeed's layers call, computed by torch under a device's rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from npu_operators.attention import npu_fusion_attention
from npu_operators.cross_entropy import npu_cross_entropy_loss
from npu_operators.layers import npu_grouped_matmul, npu_rms_norm, npu_rotary_mul, npu_swiglu
from npu_operators.schemas import SCHEMAS

__all__ = ["COMPUTED", "SCHEMAS"]

COMPUTED: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        npu_cross_entropy_loss,
        npu_fusion_attention,
        npu_rms_norm,
        npu_swiglu,
        npu_rotary_mul,
        npu_grouped_matmul,
    )
}
