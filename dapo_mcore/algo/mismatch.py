"""The gap between the engine that sampled and the policy that trains, on the same weights, and its correction.

rho = pi_old / pi_rollout of a token: what the trainer computes over what the engine reported. The corrections are part
of the data, not of the objective: nothing is differentiated through rho.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dapo_mcore.observe.metrics import Ratio
from dapo_mcore.types import TrainBatch

MAX_LOG_RHO = 20.0  # rho is formed within exp(+-20), so that one outlier leaves everything finite

LogRatio = Callable[[TrainBatch, Tensor], Tensor]
Correction = Callable[[TrainBatch], tuple[TrainBatch, dict[str, Ratio]]]


def log_rho(batch: TrainBatch) -> Tensor:
    """[N] float64, 0 where the token is not trained."""
    assert batch.old_logprobs is not None, "a correction needs log-probabilities of the trainer"
    difference = batch.old_logprobs.double() - batch.rollout_logprobs.double()
    return torch.where(batch.loss_mask, difference, 0.0)


def of_token(batch: TrainBatch, logs: Tensor) -> Tensor:
    """Every token has its own log rho: biased, of low variance."""
    return logs


def of_sequence(batch: TrainBatch, logs: Tensor) -> Tensor:
    """The log of the product of rho over the response, for each of its tokens: unbiased, of high variance."""
    return batch.sum_by_response(logs)[batch.responses]


def of_sequence_mean(batch: TrainBatch, logs: Tensor) -> Tensor:
    """The log of the geometric mean of rho over the response, for each of its tokens: does not grow with length."""
    return (batch.sum_by_response(logs) / batch.trained_lengths.clamp(min=1))[batch.responses]


def importance_weighted(
    batch: TrainBatch, level: LogRatio, lower: float, upper: float
) -> tuple[TrainBatch, dict[str, Ratio]]:
    """The advantages times an importance weight: that is the policy term times it, as it is linear in the advantage.

    With `lower` 0 the weight is min(rho, upper): truncated importance sampling (TIS; Yao et al., "Your Efficient RL
    Framework Secretly Brings You Off-Policy RL Training", 2025). Otherwise it is rho inside [lower, upper] and 0
    outside (IcePop, arXiv:2510.18855). Tokens with weight 0 stay in the denominator.
    """
    rho = level(batch, log_rho(batch)).clamp(-MAX_LOG_RHO, MAX_LOG_RHO).exp()
    outside = (rho > upper) | (rho < lower)
    weights = rho.clamp(max=upper) if lower == 0 else torch.where(outside, 0.0, rho)
    trained = batch.loss_mask
    metrics = {
        "actor/is_weight": _mean(weights[trained]),
        "actor/is_outside_fraction": _mean(outside[trained]),
    }
    weighted = torch.where(trained, batch.advantages * weights.to(batch.advantages.dtype), 0.0)
    return replace(batch, advantages=weighted), metrics


def rejected(batch: TrainBatch, level: LogRatio, lower: float, upper: float) -> tuple[TrainBatch, dict[str, Ratio]]:
    """Without the tokens whose rho is outside [lower, upper]: they leave the loss mask and with it every denominator.

    On a sequence level whole responses leave: masked importance sampling by the product (MIS; verl's seq_sum_k1) or by
    the geometric mean (verl's seq_mean_k1), Liu et al., "When Speed Kills Stability", 2025. Each token on its own:
    verl's token_k1.
    """
    logs = level(batch, log_rho(batch))
    outside = batch.loss_mask & ((logs > math.log(upper)) | (logs < math.log(lower)))
    metrics = {"actor/rejected_fraction": _mean(outside[batch.loss_mask])}
    return replace(batch, loss_mask=batch.loss_mask & ~outside), metrics


def gap_metrics(old_logprobs: Tensor, rollout_logprobs: Tensor, loss_mask: Tensor) -> dict[str, Ratio]:
    """Of the trained tokens among [N]: mean and largest |log rho|, KL, share beyond a factor of 2, sample size.

    kl is the k3 estimate of KL(pi_rollout || pi_old). The effective sample size is (sum rho)^2 / sum rho^2, as a share
    of the tokens: 1 when engine and trainer agree.
    """
    logs = (old_logprobs.double() - rollout_logprobs.double())[loss_mask].clamp(-MAX_LOG_RHO, MAX_LOG_RHO)
    rho, distance = logs.exp(), logs.abs()
    return {
        "actor/mismatch_abs": _mean(distance),
        "actor/mismatch_max": Ratio(float(distance.max()) if len(distance) else 0.0, 1),
        "actor/mismatch_kl": _mean(logs.expm1() - logs),
        "actor/mismatch_beyond_2x": _mean(distance > math.log(2)),
        "actor/mismatch_effective_sample_size": Ratio(float(rho.sum().square() / rho.square().sum()), len(rho)),
    }


def _mean(values: Tensor) -> Ratio:
    return Ratio(float(values.double().sum()), len(values))
