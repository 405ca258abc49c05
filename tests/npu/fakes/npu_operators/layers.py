"""Operators inside MindSpeed's layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from npu_contract import require
from torch import Tensor


def npu_rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The norm over the last axis, and the reciprocal of the root mean square."""
    wide = x.float()
    reciprocal = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (wide * reciprocal * gamma.float()).to(x.dtype), reciprocal


def npu_swiglu(x: Tensor, dim: int = -1) -> Tensor:
    gate, up = x.chunk(2, dim)
    return F.silu(gate) * up


def npu_rotary_mul(x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Any = None) -> Tensor:
    """r1, r2: cosines and sines, which the axes of x are laid over."""
    require(rotary_mode == "half", "queries and keys are rotated by halves")
    first, second = x.chunk(2, -1)
    return x * r1 + torch.cat([-second, first], -1) * r2


def npu_rotary_position_embedding(x: Tensor, cos: Tensor, sin: Tensor, mode: int) -> Tensor:
    require(x.dim() == cos.dim() == sin.dim() == 4, "x, cosines and sines have four axes")
    require(mode == 0, "queries and keys are rotated by halves")
    return npu_rotary_mul(x, cos, sin)


def npu_grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    group_list: Tensor,
    group_type: int,
    group_list_type: int,
    **_: Any,
) -> list[Tensor]:
    """Rows of each group by its own matrix, or (type 2, for gradients) a product for each group of columns and rows."""
    require(group_list_type == 1, "group_list holds the groups' sizes")
    sizes = group_list.tolist()
    if group_type == 0:
        return [torch.cat([rows @ matrix for rows, matrix in zip(x[0].split(sizes), weight, strict=True)])]
    require(group_type == 2, "group_type is 0 or 2")
    pairs = zip(x[0].split(sizes, 1), weight[0].split(sizes), strict=True)
    return [torch.stack([columns @ rows for columns, rows in pairs])]
