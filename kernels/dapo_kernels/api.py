"""The three entry points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_kernels import checks, reference, registry
from dapo_kernels.attach import PrecomputedGradients
from dapo_kernels.chunks import Head, Walk, refuse_missing_targets, rows_per_chunk
from dapo_kernels.gemm import select_gemm
from dapo_kernels.heads import LinearHead, LogitsHead
from dapo_kernels.policy import TokenInputs, policy_statistics
from dapo_kernels.shard import VocabShard
from dapo_kernels.spec import PolicyLossSpec


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """T tokens; everything but `loss` is detached. Float32, or float64 for float64 inputs. Equal on all TP ranks."""

    loss: Tensor  # 0-d: scale times the sum over the loss mask; differentiable
    logprobs: Tensor  # [T] of the targets under softmax(logits / temperature); 0 outside the loss mask
    entropy: Tensor  # [T] of that distribution, nats; 0 outside the loss mask
    stats: dict[str, Tensor]  # 0-d sums over the loss mask, see policy.policy_statistics; nobody has divided them


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
    ratio is 1 and its gradient that of the log-probability. `scale` is 1 / (number of tokens of the optimizer's batch).

    Tensor parallelism: `weight` is this rank's shard with global ids from `vocab_start`; shards may differ in size. The
    gradient of `hidden` is this rank's part, to be summed over the group by the caller (Megatron's
    `copy_to_tensor_model_parallel_region` does). Columns with ids >= `vocab_size` are padding and ignored.

    The gradient is made here, in the forward; the backward scales it. With `accumulate_into_main_grad` the backward
    adds the weight's gradient to `weight.main_grad` in float32 and sets `weight.grad_added_to_main_grad`.
    """
    checks.check_linear(hidden, weight)
    optional = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "token_weights": token_weights}
    checks.check_tokens(hidden, targets, advantages, loss_mask, optional, spec)
    checks.check_shard(vocab_start, vocab_size, spec.temperature)
    checks.check_scale(scale)
    if accumulate_into_main_grad and not hasattr(weight, "main_grad"):
        raise ValueError(f"weight: shape {list(weight.shape)} without main_grad, which accumulate_into_main_grad needs")
    shard = VocabShard(vocab_start, _real_columns(weight.shape[0], vocab_start, vocab_size), tp_group)
    tokens = TokenInputs(advantages, old_logprobs, ref_logprobs, token_weights)
    name = registry.resolve(backend, hidden.device)
    rows = _unmasked_rows(loss_mask, scale)
    factor = _as_tensor(scale, hidden)
    if name == registry.REFERENCE:
        logits = reference.linear_logits(hidden[rows], weight[: shard.columns])
        return _reference_loss(logits, targets, tokens, rows, spec, factor, shard)
    wants_hidden, wants_weight = _wants_gradient(hidden), _wants_gradient(weight)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=factor.dtype) if wants_weight else None
        added = None if grad_weight is None else grad_weight[: shard.columns]
        gemm = select_gemm(hidden.device, hidden.dtype)
        head = LinearHead(hidden, weight[: shard.columns], rows, gemm, grad_hidden, added)
        result = _walk(head, targets, tokens, rows, spec, factor, shard, name, chunk_rows)
    if not (wants_hidden or wants_weight):
        return result
    gradients, into_main_grad = (grad_hidden, grad_weight), accumulate_into_main_grad and wants_weight
    loss = PrecomputedGradients.apply(result.loss, factor, into_main_grad, gradients, hidden, weight)
    return PolicyLoss(loss, result.logprobs, result.entropy, result.stats)


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
    optional = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "token_weights": token_weights}
    checks.check_tokens(logits, targets, advantages, loss_mask, optional, spec)
    checks.check_shard(vocab_start, vocab_size, spec.temperature)
    checks.check_scale(scale)
    shard = VocabShard(vocab_start, _real_columns(logits.shape[1], vocab_start, vocab_size), tp_group)
    tokens = TokenInputs(advantages, old_logprobs, ref_logprobs, token_weights)
    name = registry.resolve(backend, logits.device)
    rows = _unmasked_rows(loss_mask, scale)
    factor = _as_tensor(scale, logits)
    if name == registry.REFERENCE:
        return _reference_loss(logits[rows, : shard.columns], targets, tokens, rows, spec, factor, shard)
    wants_gradient = _wants_gradient(logits)
    with torch.no_grad():
        gradient = None
        if wants_gradient:
            gradient = logits.detach() if inplace else torch.zeros_like(logits)
        if wants_gradient and inplace:
            gradient[~loss_mask] = 0
            gradient[:, shard.columns :] = 0
        head = LogitsHead(logits.detach(), shard.columns, rows, gradient)
        result = _walk(head, targets, tokens, rows, spec, factor, shard, name, chunk_rows)
    if gradient is None:
        return result
    loss = PrecomputedGradients.apply(result.loss, factor, False, (gradient,), logits)
    return PolicyLoss(loss, result.logprobs, result.entropy, result.stats)


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
    checks.check_shard(vocab_start, vocab_size, temperature)
    if loss_mask is not None:
        checks.check_row("loss_mask", loss_mask, hidden, (torch.bool,))
    shard = VocabShard(vocab_start, _real_columns(weight.shape[0], vocab_start, vocab_size), tp_group)
    rows = torch.arange(len(targets), device=targets.device) if loss_mask is None else _unmasked_rows(loss_mask, 1.0)
    spec = PolicyLossSpec(temperature=temperature)
    weight = weight[: shard.columns]
    name = registry.resolve(backend, hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        if name == registry.REFERENCE:
            logits = reference.linear_logits(hidden[rows], weight)
            logprobs, entropy = reference.logprobs_and_entropy(logits, targets[rows], temperature, shard)
        else:
            head = LinearHead(hidden, weight, rows, select_gemm(hidden.device, hidden.dtype), None, None)
            logprobs, entropy = _log_probabilities(head, targets[rows], None, spec, shard, name, chunk_rows, hidden)
    if hidden.device.type == "cpu":
        refuse_missing_targets(int(_unknown(targets[rows], logprobs, shard)))
    return TokenLogprobs(_scatter(logprobs, rows, len(targets)), _scatter(entropy, rows, len(targets)))


def _walk(
    head: Head,
    targets: Tensor,
    tokens: TokenInputs,
    rows: Tensor,
    spec: PolicyLossSpec,
    factor: Tensor,
    shard: VocabShard,
    backend: str,
    chunk_rows: int | None,
) -> PolicyLoss:
    tokens = tokens.select(rows).to(factor.dtype)
    logprobs, entropy = _log_probabilities(head, targets[rows], tokens, spec, shard, backend, chunk_rows, factor)
    loss = reference.total_loss(logprobs, entropy, tokens, spec) * factor
    return _result(loss, logprobs, entropy, tokens, rows, len(targets), spec)


def _log_probabilities(
    head: Head,
    targets: Tensor,
    tokens: TokenInputs | None,
    spec: PolicyLossSpec,
    shard: VocabShard,
    backend: str,
    chunk_rows: int | None,
    like: Tensor,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(like.dtype, torch.float32)
    logprobs = torch.empty(len(targets), dtype=dtype, device=like.device)
    entropy = torch.empty_like(logprobs)
    if chunk_rows is None:
        chunk_rows = rows_per_chunk(shard.columns, dtype.itemsize, like.device, 2 if shard.is_split else 1)
    walk = Walk(head, registry.row_kernels(backend), targets, tokens, spec, shard, logprobs, entropy)
    walk.run(chunk_rows)
    return logprobs, entropy


def _reference_loss(
    logits: Tensor,
    targets: Tensor,
    tokens: TokenInputs,
    rows: Tensor,
    spec: PolicyLossSpec,
    factor: Tensor,
    shard: VocabShard,
) -> PolicyLoss:
    tokens = tokens.select(rows).to(factor.dtype)
    logprobs, entropy = reference.logprobs_and_entropy(logits, targets[rows], spec.temperature, shard)
    refuse_missing_targets(int(_unknown(targets[rows], logprobs, shard)))
    loss = reference.total_loss(logprobs, entropy, tokens, spec) * factor
    return _result(loss, logprobs.detach(), entropy.detach(), tokens, rows, len(targets), spec)


def _result(
    loss: Tensor, logprobs: Tensor, entropy: Tensor, tokens: TokenInputs, rows: Tensor, total: int, spec: PolicyLossSpec
) -> PolicyLoss:
    stats = policy_statistics(logprobs, entropy, tokens, spec)
    return PolicyLoss(loss, _scatter(logprobs, rows, total), _scatter(entropy, rows, total), stats)


def _unknown(targets: Tensor, logprobs: Tensor, shard: VocabShard) -> Tensor:
    """How many targets no shard holds (0-d)."""
    if shard.is_split:
        return logprobs.isnan().sum()
    return (shard.local(targets) < 0).sum()


def _unmasked_rows(loss_mask: Tensor, scale: float | Tensor) -> Tensor:
    """Indices [n] of the tokens in the loss, ascending. Waits for the device, once."""
    finite = scale.isfinite().to(loss_mask.device) if isinstance(scale, Tensor) else loss_mask.new_ones(())
    count, is_finite = torch.stack([loss_mask.sum(), finite.long()]).tolist()
    if not is_finite:
        raise ValueError("scale: a 0-d tensor that is not finite, expected 1 / (number of tokens of the batch)")
    return torch.argsort((~loss_mask).to(torch.uint8), stable=True)[:count]


def _as_tensor(scale: float | Tensor, like: Tensor) -> Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)
    if isinstance(scale, Tensor):
        return scale.detach().to(like.device, dtype, non_blocking=True)
    return torch.full((), scale, dtype=dtype, device=like.device)


def _wants_gradient(tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad


def _real_columns(held: int, vocab_start: int, vocab_size: int | None) -> int:
    return held if vocab_size is None else max(0, min(held, vocab_size - vocab_start))


def _scatter(values: Tensor, rows: Tensor, total: int) -> Tensor:
    return values.new_zeros(total).index_copy_(0, rows, values)
