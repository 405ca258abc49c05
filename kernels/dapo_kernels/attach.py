"""Gradients that exist before the backward: it only scales them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class PrecomputedGradients(torch.autograd.Function):
    """Returns `value` 0-d; its gradient for inputs[i] is `factor` times gradients[i], scaled in place, once.

    A second backward through the same graph raises torch's error about modified saved tensors. With
    `into_main_grad` the last input is a parameter with a float32 `main_grad`: its gradient is added there, and autograd
    gets zeros, so that the hooks of the parameter still fire (Megatron's convention).
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        factor: Tensor,
        into_main_grad: bool,
        gradients: tuple[Tensor | None, ...],
        *inputs: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(factor, *gradients)
        ctx.parameter = inputs[-1] if into_main_grad else None
        ctx.dtypes = tuple(tensor.dtype for tensor in inputs)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        factor, *gradients = ctx.saved_tensors
        factor = factor * grad_output
        results = [None if gradient is None else gradient.mul_(factor) for gradient in gradients]
        if ctx.parameter is not None and results[-1] is not None:
            ctx.parameter.main_grad.add_(results[-1])
            ctx.parameter.grad_added_to_main_grad = True
            results[-1] = torch.zeros_like(ctx.parameter)
        cast = (None if x is None else x.to(dtype) for x, dtype in zip(results, ctx.dtypes, strict=True))
        return None, None, None, None, *cast
