"""The loss in plain torch and its gradient by autograd: the truth the other backends are held to.

Materialises the whole [T, V]; computes in float64 for float64 inputs and in float32 otherwise.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_kernels.policy import TokenInputs, bonus_weights, token_loss
from dapo_kernels.shard import VocabShard
from dapo_kernels.spec import PolicyLossSpec


def linear_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.to(dtype) @ weight.to(dtype).T


def logprobs_and_entropy(
    logits: Tensor, targets: Tensor, temperature: float, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """[n, columns] logits and [n] global ids -> log-probabilities [n] and entropy [n], differentiable in `logits`.

    Under tensor parallelism each rank sees the gradient of its own columns.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits, first = _gather_columns(logits.to(dtype), shard)
    all_logprobs = torch.log_softmax(logits / temperature, dim=-1)
    column = targets - first
    known = (column >= 0) & (column < logits.shape[1])
    logprobs = all_logprobs.gather(1, torch.where(known, column, 0)[:, None])[:, 0]
    products = torch.where(all_logprobs == -torch.inf, 0.0, all_logprobs) * all_logprobs.exp()
    return torch.where(known, logprobs, torch.nan), -products.sum(-1)


def _gather_columns(logits: Tensor, shard: VocabShard) -> tuple[Tensor, int]:
    """All columns of the vocabulary in the order of their ids, and the first id."""
    if not shard.is_split:
        return logits, shard.start
    shards: list[tuple[int, Tensor]] = [None] * dist.get_world_size(shard.group)  # type: ignore[list-item]
    dist.all_gather_object(shards, (shard.start, logits.detach().cpu()), group=shard.group)
    shards = [(start, part.to(logits.device)) for start, part in shards]
    shards[dist.get_rank(shard.group)] = (shard.start, logits)
    shards.sort(key=lambda entry: entry[0])
    return torch.cat([part for _, part in shards], dim=1), shards[0][0]


def total_loss(logprobs: Tensor, entropy: Tensor, tokens: TokenInputs, spec: PolicyLossSpec) -> Tensor:
    """Sum over the n tokens, 0-d; differentiable in `logprobs` and `entropy`."""
    loss = token_loss(logprobs, tokens, spec)
    if tokens.token_weights is not None:
        loss = loss * tokens.token_weights
    bonus = bonus_weights(entropy, tokens, spec)
    return (loss if bonus is None else loss - bonus * entropy).sum()
