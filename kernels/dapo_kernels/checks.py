"""What callers may pass. Nothing here reads a tensor's values, so nothing waits for a device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dapo_kernels.policy import TokenInputs
from dapo_kernels.spec import PolicyLossSpec

FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_matrix(name: str, tensor: Tensor, shape: str) -> None:
    if tensor.dim() != 2:
        raise ValueError(f"{name}: shape {list(tensor.shape)}, expected {shape}")
    if tensor.dtype not in FLOATING:
        raise ValueError(f"{name}: dtype {tensor.dtype}, expected bfloat16, float16, float32 or float64")


def check_linear(hidden: Tensor, weight: Tensor) -> None:
    check_matrix("hidden", hidden, "[T, H]")
    check_matrix("weight", weight, "[V/tp, H]")
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight: shape {list(weight.shape)}, expected [V/tp, {hidden.shape[1]}] as hidden is {list(hidden.shape)}"
        )
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight: dtype {weight.dtype}, expected {hidden.dtype} like hidden")
    _check_device("weight", weight, hidden)


def check_row(name: str, tensor: Tensor, like: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """`tensor` must be [T] on the device of `like` [T, ...]."""
    if tensor.shape != like.shape[:1]:
        raise ValueError(f"{name}: shape {list(tensor.shape)}, expected [{like.shape[0]}], one entry per token")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name}: dtype {tensor.dtype} with shape {list(tensor.shape)}, expected {names}")
    _check_device(name, tensor, like)


def check_tokens(like: Tensor, targets: Tensor, loss_mask: Tensor, tokens: TokenInputs, spec: PolicyLossSpec) -> None:
    check_row("targets", targets, like, (torch.int64,))
    check_row("loss_mask", loss_mask, like, (torch.bool,))
    floats = (torch.float32,) if like.dtype != torch.float64 else (torch.float32, torch.float64)
    for name in ("advantages", "old_logprobs", "ref_logprobs", "token_weights"):
        tensor = getattr(tokens, name)
        if tensor is not None:
            check_row(name, tensor, like, floats)
    if spec.kl_coeff != 0 and tokens.ref_logprobs is None:
        raise ValueError(f"ref_logprobs: None, expected [{like.shape[0]}] float32 because kl_coeff={spec.kl_coeff}")


def check_shard(vocab_start: int, vocab_size: int | None) -> None:
    if vocab_start < 0:
        raise ValueError(f"vocab_start: {vocab_start}, expected the first global id of this rank's shard, 0 or above")
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"vocab_size: {vocab_size}, expected the number of real vocabulary entries, 1 or above")


def check_scale(scale: float | Tensor) -> None:
    if isinstance(scale, Tensor):
        if scale.dim() != 0:
            raise ValueError(f"scale: shape {list(scale.shape)}, expected a number or a 0-d tensor")
    elif not math.isfinite(scale):
        raise ValueError(f"scale: {scale}, expected a finite number: 1 / (number of tokens of the optimizer's batch)")


def check_chunk_rows(chunk_rows: int | None) -> None:
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows: {chunk_rows}, expected the number of tokens per chunk, 1 or above, or None")


def _check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name}: on {tensor.device} with shape {list(tensor.shape)}, expected {like.device}")
