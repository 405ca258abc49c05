"""The end of the policy's forward: hidden states and head weight -> loss or log-probabilities, by dapo_kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from dapo_kernels import TokenLogprobs, fused_linear_policy_loss, linear_logprobs
from megatron.core import parallel_state
from torch import Tensor

from dapo_mcore.actor.objective import Objective
from dapo_mcore.actor.packing import MicroBatch
from dapo_mcore.actor.policy_model import Head, HeadInput
from dapo_mcore.observe.metrics import Ratio
from dapo_mcore.types import TrainBatch


@dataclass(frozen=True, slots=True)
class HeadOutput:
    loss: Tensor  # 0-d: this micro-batch's part, already divided by the denominator of all micro-batches and ranks
    tokens: Tensor  # [R]: places of the wanted tokens among the batch's N response tokens
    logprobs: Tensor  # [R] float32, detached
    sums: dict[str, Tensor]  # 0-d sums over the tokens, detached; one entry per metric


# metric -> the sum it is made of; every sum is divided by the number of trained tokens, whatever the aggregation
METRICS = {
    "actor/loss": "loss",  # of the aggregation, with penalty and bonus
    "actor/entropy": "entropy",
    "actor/clip_fraction_high": "clip_high",
    "actor/clip_fraction_low": "clip_low",
    "actor/clip_fraction_dual": "clip_dual",
    "actor/ratio_mean": "ratio",
    "actor/kl_old": "old_kl",  # k1 estimate of KL(pi_old || pi)
}
REFERENCE_METRICS = {"actor/kl_ref": "kl"}  # the estimate of KL(pi || pi_ref) that the loss would use


def metric_sums(batch: TrainBatch) -> dict[str, str]:
    """As METRICS, of those an update on `batch` has; the same on every rank."""
    return METRICS if batch.ref_logprobs is None else METRICS | REFERENCE_METRICS


def policy_loss_head(batch: TrainBatch, objective: Objective) -> Head:
    """The loss over `batch`: every micro-batch divides its weighted sum by the denominator of the whole batch.

    Its micro-batches must want exactly the tokens of the loss mask.
    """
    num_tokens, names = batch.num_loss_tokens, metric_sums(batch).values()
    weights, denominator = objective.aggregate(batch)
    spec = replace(objective.spec, temperature=batch.temperature)

    def head(micro_batch: MicroBatch, given: HeadInput) -> HeadOutput:
        device, tokens = given.hidden.device, micro_batch.tokens

        def of_micro_batch(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[tokens].to(device)

        old = of_micro_batch(batch.old_logprobs)
        if old is not None and objective.ratio_of_sequence:
            logprobs = _logprobs(micro_batch, given, batch.temperature).logprobs
            old = logprobs - _sequence_log_ratio(batch, tokens, logprobs - old)
        result = fused_linear_policy_loss(
            given.hidden,
            given.weight,
            micro_batch.targets,
            batch.advantages[tokens].to(device),
            torch.ones_like(micro_batch.targets, dtype=torch.bool),  # unwanted rows never get here
            spec,
            old_logprobs=old,
            ref_logprobs=of_micro_batch(batch.ref_logprobs),
            token_weights=of_micro_batch(weights),
            scale=1.0 / denominator,
            tp_group=given.group,
            vocab_start=given.vocab_start,
            vocab_size=given.vocab_size,
        )
        sums = {"loss": result.loss.detach().double() * num_tokens, **result.stats}
        return HeadOutput(result.loss, tokens, result.logprobs.detach(), {name: sums[name].detach() for name in names})

    return head


def logprob_head(temperature: float) -> Head:
    """Log-probabilities of the wanted tokens, without a loss."""

    def head(micro_batch: MicroBatch, given: HeadInput) -> HeadOutput:
        logprobs = _logprobs(micro_batch, given, temperature).logprobs
        return HeadOutput(logprobs.sum(), micro_batch.tokens, logprobs, {})

    return head


def _logprobs(micro_batch: MicroBatch, given: HeadInput, temperature: float) -> TokenLogprobs:
    return linear_logprobs(
        given.hidden,
        given.weight,
        micro_batch.targets,
        temperature=temperature,
        tp_group=given.group,
        vocab_start=given.vocab_start,
        vocab_size=given.vocab_size,
    )


def _sequence_log_ratio(batch: TrainBatch, tokens: Tensor, log_ratio: Tensor) -> Tensor:
    """[R]: the mean of `log_ratio` [R] over the trained tokens of each token's response. GSPO, arXiv:2507.18071.

    Context-parallel ranks hold other tokens of the same responses: they meet here, once per micro-batch.
    """
    responses, lengths = batch.responses[tokens].to(log_ratio.device), batch.trained_lengths.to(log_ratio.device)
    sums = log_ratio.new_zeros(len(batch)).index_add_(0, responses, log_ratio)
    if parallel_state.get_context_parallel_world_size() > 1:
        dist.all_reduce(sums, group=parallel_state.get_context_parallel_group())
    return (sums / lengths.clamp(min=1))[responses]


def as_ratios(sums: dict[str, float], batch: TrainBatch) -> dict[str, Ratio]:
    return {metric: Ratio(sums[name], batch.num_loss_tokens) for metric, name in metric_sums(batch).items()}
