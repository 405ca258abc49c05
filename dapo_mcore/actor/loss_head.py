"""The end of the policy's forward: hidden states and head weight -> loss or log-probabilities, by dapo_kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from dapo_kernels import PolicyLossSpec, fused_linear_policy_loss, linear_logprobs
from torch import Tensor

from dapo_mcore.actor.packing import MicroBatch
from dapo_mcore.actor.policy_model import Head, HeadInput
from dapo_mcore.config import ActorConfig
from dapo_mcore.observe.metrics import Ratio
from dapo_mcore.types import TrainBatch


@dataclass(frozen=True, slots=True)
class HeadOutput:
    loss: Tensor  # 0-d: this micro-batch's part, already divided by the tokens of all micro-batches and ranks
    tokens: Tensor  # [R]: places of the wanted tokens among the batch's N response tokens
    logprobs: Tensor  # [R] float32, detached
    sums: dict[str, Tensor]  # 0-d sums over the tokens, detached; one entry per METRICS


# metric -> the sum it is made of; every sum is divided by the number of trained tokens
METRICS = {
    "actor/loss": "loss",
    "actor/entropy": "entropy",
    "actor/clip_fraction_high": "clip_high",
    "actor/clip_fraction_low": "clip_low",
    "actor/clip_fraction_dual": "clip_dual",
    "actor/ratio_mean": "ratio",
    "actor/kl_old": "old_kl",  # k1 estimate of KL(pi_old || pi)
    "actor/mismatch_abs": "mismatch_abs",  # |log pi_old - log pi_rollout|
    "actor/mismatch_kl": "mismatch_kl",  # k3 estimate of KL(pi_rollout || pi_old)
}


def policy_loss_spec(config: ActorConfig, temperature: float) -> PolicyLossSpec:
    return PolicyLossSpec(
        clip_low=config.clip_ratio_low,
        clip_high=config.clip_ratio_high,
        clip_ratio_c=config.clip_ratio_c,
        temperature=temperature,
        entropy_coeff=config.entropy_coeff,
    )


def policy_loss_head(batch: TrainBatch, spec: PolicyLossSpec) -> Head:
    """The token-mean loss over `batch`: every micro-batch divides its sum by the trained tokens of the whole batch.

    Its micro-batches must want exactly the tokens of the loss mask.
    """
    num_tokens = batch.num_loss_tokens

    def head(micro_batch: MicroBatch, given: HeadInput) -> HeadOutput:
        device, tokens = given.hidden.device, micro_batch.tokens
        old = None if batch.old_logprobs is None else batch.old_logprobs[tokens].to(device)
        result = fused_linear_policy_loss(
            given.hidden,
            given.weight,
            micro_batch.targets,
            batch.advantages[tokens].to(device),
            torch.ones_like(micro_batch.targets, dtype=torch.bool),  # unwanted rows never get here
            spec,
            old_logprobs=old,
            scale=1.0 / num_tokens,
            tp_group=given.group,
            vocab_start=given.vocab_start,
            vocab_size=given.vocab_size,
        )
        before = result.logprobs if old is None else old
        sums = {
            "loss": result.loss.detach().double() * num_tokens,
            **result.stats,
            **_mismatch(before, batch.rollout_logprobs[tokens].to(device)),
        }
        wanted = {name: sums[name].detach() for name in METRICS.values()}
        return HeadOutput(result.loss, tokens, result.logprobs.detach(), wanted)

    return head


def logprob_head(temperature: float) -> Head:
    """Log-probabilities of the wanted tokens, without a loss."""

    def head(micro_batch: MicroBatch, given: HeadInput) -> HeadOutput:
        result = linear_logprobs(
            given.hidden,
            given.weight,
            micro_batch.targets,
            temperature=temperature,
            tp_group=given.group,
            vocab_start=given.vocab_start,
            vocab_size=given.vocab_size,
        )
        return HeadOutput(result.logprobs.sum(), micro_batch.tokens, result.logprobs, {})

    return head


def _mismatch(old_logprobs: Tensor, rollout_logprobs: Tensor) -> dict[str, Tensor]:
    """How far the engine that sampled is from the policy that trains, on the same weights; sums over [R] tokens."""
    difference = (old_logprobs - rollout_logprobs).detach().clamp(-20.0, 20.0)
    return {"mismatch_abs": difference.abs().sum(), "mismatch_kl": (difference.expm1() - difference).sum()}


def as_ratios(sums: dict[str, float], num_tokens: int) -> dict[str, Ratio]:
    return {metric: Ratio(sums[name], num_tokens) for metric, name in METRICS.items()}
