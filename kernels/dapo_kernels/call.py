"""One call, checked and reduced to its unmasked tokens, run by the chosen backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dapo_kernels import reference, registry
from dapo_kernels.chunks import Head, Walk, refuse_missing_targets, rows_per_chunk
from dapo_kernels.heads import LogitsHead
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


@dataclass(frozen=True, slots=True)
class Call:
    """T tokens, n of them in the loss."""

    rows: Tensor  # [n] int64: which of the T
    targets: Tensor  # [T] global ids
    tokens: TokenInputs  # [T] each
    spec: PolicyLossSpec
    scale: Tensor  # 0-d
    shard: VocabShard
    backend: str
    chunk_rows: int | None

    def by_reference(self, logits: Tensor) -> PolicyLoss:
        """logits [n, columns], differentiable."""
        targets = self.targets[self.rows]
        logprobs, entropy = reference.logprobs_and_entropy(logits, targets, self.spec.temperature, self.shard)
        refuse_missing_targets(count_missing(targets, logprobs, self.shard))
        loss = self.loss(logprobs, entropy)
        return self.result(loss, logprobs.detach(), entropy.detach())

    def by_chunks(self, head: Head) -> PolicyLoss:
        """The gradient goes to `head`, without the scale; the loss is not differentiable."""
        tokens = self.tokens.select(self.rows).to(self.scale.dtype)
        logprobs, entropy = walk_chunks(
            head, self.targets[self.rows], tokens, self.spec, self.shard, self.backend, self.chunk_rows, self.scale
        )
        return self.result(self.loss(logprobs, entropy), logprobs, entropy)

    def by_logits(self, logits: Tensor, loss_mask: Tensor, gradient: Tensor | None) -> tuple[PolicyLoss, Tensor]:
        """From logits [T, V]; writes `gradient` [T, V], which may be the logits; returns the factor it lacks."""
        kernels = registry.row_kernels(self.backend)
        if kernels.loss_from_logits is None or self.shard.is_split:
            if gradient is not None:
                gradient[~loss_mask] = 0
                gradient[:, self.shard.columns :] = 0
            return self.by_chunks(LogitsHead(logits, self.shard.columns, self.rows, gradient)), self.scale
        # A gradient of 1e-6 would be lost in float16; the scale then follows in the backward, with the loss scaler.
        folded, pending = self.scale, torch.ones_like(self.scale)
        if logits.dtype == torch.float16:
            folded, pending = pending, folded
        columns = self.shard.local(self.targets)
        logprobs, entropy = kernels.loss_from_logits(
            logits, self.shard.columns, columns, loss_mask, self.tokens, self.spec, folded, gradient
        )
        logprobs, entropy = logprobs[self.rows], entropy[self.rows]
        return self.result(self.loss(logprobs, entropy), logprobs, entropy), pending

    def loss(self, logprobs: Tensor, entropy: Tensor) -> Tensor:
        tokens = self.tokens.select(self.rows).to(self.scale.dtype)
        return reference.total_loss(logprobs, entropy, tokens, self.spec) * self.scale

    def result(self, loss: Tensor, logprobs: Tensor, entropy: Tensor) -> PolicyLoss:
        """logprobs, entropy [n]."""
        tokens = self.tokens.select(self.rows).to(self.scale.dtype)
        stats = policy_statistics(logprobs, entropy, tokens, self.spec)
        total = len(self.targets)
        return PolicyLoss(loss, spread(logprobs, self.rows, total), spread(entropy, self.rows, total), stats)


def walk_chunks(
    head: Head,
    targets: Tensor,
    tokens: TokenInputs | None,
    spec: PolicyLossSpec,
    shard: VocabShard,
    backend: str,
    chunk_rows: int | None,
    like: Tensor,
) -> tuple[Tensor, Tensor]:
    """logprobs [n], entropy [n] of the rows of `head`, in the accumulator's type of `like`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    logprobs = torch.empty(len(targets), dtype=dtype, device=like.device)
    entropy = torch.empty_like(logprobs)
    if chunk_rows is None:
        chunk_rows = rows_per_chunk(shard.columns, dtype.itemsize, like.device, 2 if shard.is_split else 1)
    Walk(head, registry.row_kernels(backend), targets, tokens, spec, shard, logprobs, entropy).run(chunk_rows)
    return logprobs, entropy


def unmasked_rows(loss_mask: Tensor, scale: float | Tensor, targets: Tensor, shard: VocabShard) -> Tensor:
    """Indices [n] of the tokens in the loss, ascending.

    Their number must be known to the host, the one wait for the device before the first GEMM; what else only values can
    tell is checked with the same wait.
    """
    finite = scale.isfinite().to(loss_mask.device) if isinstance(scale, Tensor) else loss_mask.new_ones(())
    misplaced = loss_mask.new_zeros(()) if shard.is_split else ((shard.local(targets) < 0) & loss_mask).sum()
    count, is_finite, missing = torch.stack([loss_mask.sum(), finite.long(), misplaced.long()]).tolist()
    if not is_finite:
        raise ValueError("scale: a 0-d tensor that is not finite, expected 1 / (number of tokens of the batch)")
    refuse_missing_targets(missing)
    return torch.argsort((~loss_mask).to(torch.uint8), stable=True)[:count]


def count_missing(targets: Tensor, logprobs: Tensor, shard: VocabShard) -> int:
    """How many targets no shard holds; waits for the device."""
    missing = logprobs.isnan() if shard.is_split else shard.local(targets) < 0
    return int(missing.sum())


def as_scalar(scale: float | Tensor, like: Tensor) -> Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)
    if isinstance(scale, Tensor):
        return scale.detach().to(like.device, dtype, non_blocking=True)
    return torch.full((), scale, dtype=dtype, device=like.device)


def spread(values: Tensor, rows: Tensor, total: int) -> Tensor:
    """[n] -> [T], 0 elsewhere."""
    return values.new_zeros(total).index_copy_(0, rows, values)
