"""The three entry points."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_kernels import checks, reference, registry
from dapo_kernels.attach import Precomputed
from dapo_kernels.call import Call, PolicyLoss, as_scalar, count_missing, spread, unmasked_rows, walk_chunks
from dapo_kernels.chunks import refuse_missing_targets
from dapo_kernels.gemm import select_gemm
from dapo_kernels.heads import LinearHead
from dapo_kernels.policy import TokenInputs
from dapo_kernels.shard import VocabShard
from dapo_kernels.spec import PolicyLossSpec


class TokenLogprobs(NamedTuple):
    logprobs: Tensor  # [T] float32 (float64 for float64 inputs)
    entropy: Tensor  # [T] nats


def fused_linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    spec: PolicyLossSpec,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    token_weights: Tensor | None = None,
    scale: float | Tensor = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    backend: str = "auto",
    *,
    vocab_size: int | None = None,
    accumulate_into_main_grad: bool = False,
    chunk_rows: int | None = None,
) -> PolicyLoss:
    """Policy loss of T tokens from hidden states, without ever holding [T, V] logits.

    hidden [T, H], weight [V/tp, H]: bf16, fp16, fp32 or fp64, alike. targets [T] int64 global ids. advantages,
    old_logprobs, ref_logprobs, token_weights [T] float32; loss_mask [T] bool. `old_logprobs=None` means on-policy: the
    ratio is 1 and its gradient that of the log-probability. `token_weights` times `scale` is the factor of everything a
    token adds: for the token mean no weights, and 1 / (number of tokens of the optimizer's batch).

    Tensor parallelism: `weight` is this rank's shard with global ids from `vocab_start`; shards may differ in size. The
    gradient of `hidden` is this rank's part, to be summed over the group by the caller (Megatron's
    `copy_to_tensor_model_parallel_region` does). Columns with ids >= `vocab_size` are padding and ignored.

    The gradient is made here, in the forward; the backward scales it. With `accumulate_into_main_grad` the backward
    adds the weight's gradient to `weight.main_grad` in float32 and sets `weight.grad_added_to_main_grad`.
    """
    checks.check_linear(hidden, weight)
    if accumulate_into_main_grad and not hasattr(weight, "main_grad"):
        raise ValueError(f"weight: shape {list(weight.shape)} without main_grad, which accumulate_into_main_grad needs")
    tokens = TokenInputs(advantages, old_logprobs, ref_logprobs, token_weights)
    shard = _shard(weight.shape[0], tp_group, vocab_start, vocab_size)
    call = _call(hidden, targets, loss_mask, tokens, spec, scale, shard, backend, chunk_rows)
    real_weight = weight[: shard.columns]
    if call.backend == registry.REFERENCE:
        return call.by_reference(reference.linear_logits(hidden[call.rows], real_weight))
    wants_hidden, wants_weight = _wants_gradient(hidden), _wants_gradient(weight)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=call.scale.dtype) if wants_weight else None
        real_grad_weight = None if grad_weight is None else grad_weight[: shard.columns]
        gemm = select_gemm(hidden.device, hidden.dtype)
        result = call.by_chunks(LinearHead(hidden, real_weight, call.rows, gemm, grad_hidden, real_grad_weight))
    if not (wants_hidden or wants_weight):
        return result
    scale_in_place = registry.row_kernels(call.backend).scale_in_place
    into_main_grad = accumulate_into_main_grad and wants_weight
    precomputed = Precomputed(call.scale, (grad_hidden, grad_weight), into_main_grad, scale_in_place)
    return replace(result, loss=precomputed.attach(result.loss, hidden, weight))


def fused_policy_loss_from_logits(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    spec: PolicyLossSpec,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    token_weights: Tensor | None = None,
    scale: float | Tensor = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    backend: str = "auto",
    *,
    vocab_size: int | None = None,
    inplace: bool = False,
    chunk_rows: int | None = None,
) -> PolicyLoss:
    """As `fused_linear_policy_loss`, from logits [T, V/tp] the caller holds.

    With `inplace` their gradient is written over them: they are then of no further use, and nothing else may have saved
    them for its backward.
    """
    checks.check_matrix("logits", logits, "[T, V/tp]")
    tokens = TokenInputs(advantages, old_logprobs, ref_logprobs, token_weights)
    shard = _shard(logits.shape[1], tp_group, vocab_start, vocab_size)
    call = _call(logits, targets, loss_mask, tokens, spec, scale, shard, backend, chunk_rows)
    if call.backend == registry.REFERENCE:
        return call.by_reference(logits[call.rows, : shard.columns])
    wants_gradient = _wants_gradient(logits)
    with torch.no_grad():
        gradient = None
        if wants_gradient:
            gradient = logits.detach() if inplace else torch.empty_like(logits)
        result, pending_scale = call.by_logits(logits.detach(), loss_mask, gradient)
    if gradient is None:
        return result
    scale_in_place = registry.row_kernels(call.backend).scale_in_place
    precomputed = Precomputed(pending_scale, (gradient,), False, scale_in_place)
    return replace(result, loss=precomputed.attach(result.loss, logits))


@torch.no_grad()
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    loss_mask: Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    backend: str = "auto",
    chunk_rows: int | None = None,
) -> TokenLogprobs:
    """Log-probabilities of `targets` and entropies, [T] each, 0 outside `loss_mask`; no gradient.

    A target that lies in no shard raises ValueError on CPU; elsewhere, where looking would wait for the device, its
    log-probability is NaN.
    """
    checks.check_linear(hidden, weight)
    checks.check_row("targets", targets, hidden, (torch.int64,))
    checks.check_chunk_rows(chunk_rows)
    spec = PolicyLossSpec(temperature=temperature)
    shard = _shard(weight.shape[0], tp_group, vocab_start, vocab_size)
    if loss_mask is None:
        rows = torch.arange(len(targets), device=targets.device)
    else:
        checks.check_row("loss_mask", loss_mask, hidden, (torch.bool,))
        rows = unmasked_rows(loss_mask, 1.0, targets, shard)
    name = registry.select(backend, hidden.device, hidden.dtype)
    real_weight, chosen = weight[: shard.columns], targets[rows]
    with torch.autocast(hidden.device.type, enabled=False):
        if name == registry.REFERENCE:
            logits = reference.linear_logits(hidden[rows], real_weight)
            logprobs, entropy = reference.logprobs_and_entropy(logits, chosen, temperature, shard)
        else:
            head = LinearHead(hidden, real_weight, rows, select_gemm(hidden.device, hidden.dtype), None, None)
            logprobs, entropy = walk_chunks(head, chosen, None, spec, shard, name, chunk_rows, hidden)
    if hidden.device.type == "cpu":
        refuse_missing_targets(count_missing(chosen, logprobs, shard))
    return TokenLogprobs(spread(logprobs, rows, len(targets)), spread(entropy, rows, len(targets)))


def _call(
    like: Tensor,
    targets: Tensor,
    loss_mask: Tensor,
    tokens: TokenInputs,
    spec: PolicyLossSpec,
    scale: float | Tensor,
    shard: VocabShard,
    backend: str,
    chunk_rows: int | None,
) -> Call:
    checks.check_tokens(like, targets, loss_mask, tokens, spec)
    checks.check_scale(scale)
    checks.check_chunk_rows(chunk_rows)
    name = registry.select(backend, like.device, like.dtype)
    rows = unmasked_rows(loss_mask, scale, targets, shard)
    return Call(rows, targets, tokens, spec, as_scalar(scale, like), shard, name, chunk_rows)


def _shard(held: int, tp_group: dist.ProcessGroup | None, vocab_start: int, vocab_size: int | None) -> VocabShard:
    checks.check_shard(vocab_start, vocab_size)
    real = held if vocab_size is None else max(0, min(held, vocab_size - vocab_start))
    return VocabShard(vocab_start, real, tp_group)


def _wants_gradient(tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad
