"""Gradients that exist before the backward: it only scales them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Precomputed:
    """Of a 0-d loss: its gradient for input i is factor * gradients[i]."""

    factor: Tensor  # 0-d
    gradients: tuple[Tensor | None, ...]
    into_main_grad: bool  # the last input is a parameter; its gradient goes to its float32 `main_grad`
    scale_in_place: Callable[[Tensor, Tensor], None]

    def attach(self, value: Tensor, *inputs: Tensor) -> Tensor:
        """`value`, connected to `inputs`. A second backward raises torch's error about modified saved tensors."""
        return _Attach.apply(self, value, *inputs)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, precomputed: Precomputed, value: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(precomputed.factor, *precomputed.gradients)
        ctx.scale_in_place = precomputed.scale_in_place
        ctx.parameter = inputs[-1] if precomputed.into_main_grad else None
        ctx.dtypes = tuple(tensor.dtype for tensor in inputs)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        factor, *gradients = ctx.saved_tensors
        factor = factor * grad_outputs[0]
        results: list[Tensor | None] = []
        for index, (gradient, dtype) in enumerate(zip(gradients, ctx.dtypes, strict=True)):
            if gradient is not None and ctx.parameter is not None and index == len(gradients) - 1:
                ctx.parameter.main_grad.addcmul_(gradient, factor)
                # Megatron's hook then leaves main_grad alone, but fires only if there is a gradient
                ctx.parameter.grad_added_to_main_grad = True
                gradient = torch.zeros_like(ctx.parameter)
            elif gradient is not None:
                ctx.scale_in_place(gradient, factor)
            results.append(None if gradient is None else gradient.to(dtype))
        return None, None, *results
