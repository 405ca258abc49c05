"""The three matrix products of a chunk, each with float32 (or float64) results from operands of any floating type.

Rounded to bfloat16, a logit of 20 would be off by 0.06 and the sum of the weight's gradient over chunks would lose what
each chunk adds; hence every product here leaves its accumulator unrounded.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

COLUMNS_PER_BLOCK = 4096  # of the weight converted at a time where the device needs equal types


class Gemm(Protocol):
    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        """out [n, V] = hidden [n, H] @ weight [V, H]^T."""

    def hidden_gradient(self, dlogits: Tensor, weight: Tensor) -> Tensor:
        """dlogits [n, V] @ weight [V, H] -> [n, H]."""
        ...

    def add_weight_gradient(self, dlogits: Tensor, hidden: Tensor, out: Tensor) -> None:
        """out [V, H] += dlogits [n, V]^T @ hidden [n, H]."""

    def gradient_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which type `dlogits` is wanted for operands of `dtype`."""
        ...


class SameTypeGemm:
    """Operands already have the accumulator's type."""

    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        torch.mm(hidden, weight.T, out=out)

    def hidden_gradient(self, dlogits: Tensor, weight: Tensor) -> Tensor:
        return dlogits @ weight

    def add_weight_gradient(self, dlogits: Tensor, hidden: Tensor, out: Tensor) -> None:
        out.addmm_(dlogits.T, hidden)

    def gradient_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype


class MixedTypeGemm:
    """The matrix units multiply half-precision operands and hand out their float32 accumulator."""

    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)

    def hidden_gradient(self, dlogits: Tensor, weight: Tensor) -> Tensor:
        return dlogits @ weight

    def add_weight_gradient(self, dlogits: Tensor, hidden: Tensor, out: Tensor) -> None:
        torch.addmm(out, dlogits.T, hidden, out_dtype=torch.float32, out=out)

    def gradient_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype


class UpcastGemm:
    """Half-precision operands are converted to float32, the weight block by block."""

    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        hidden = hidden.float()
        for block in _blocks(weight):
            out[:, block] = hidden @ weight[block].float().T

    def hidden_gradient(self, dlogits: Tensor, weight: Tensor) -> Tensor:
        gradient = dlogits.new_zeros(dlogits.shape[0], weight.shape[1])
        for block in _blocks(weight):
            gradient.addmm_(dlogits[:, block], weight[block].float())
        return gradient

    def add_weight_gradient(self, dlogits: Tensor, hidden: Tensor, out: Tensor) -> None:
        out.addmm_(dlogits.T, hidden.float())

    def gradient_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32


def _blocks(weight: Tensor) -> list[slice]:
    return [slice(first, first + COLUMNS_PER_BLOCK) for first in range(0, weight.shape[0], COLUMNS_PER_BLOCK)]


def select_gemm(device: torch.device, dtype: torch.dtype) -> Gemm:
    if dtype in (torch.float32, torch.float64):
        return SameTypeGemm()
    return MixedTypeGemm() if device.type == "cuda" else UpcastGemm()
