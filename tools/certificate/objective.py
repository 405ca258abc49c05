"""Every loss option as its definition reads: float64, one response after another, differentiated by autograd."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dapo_mcore.config import ActorConfig, KlEstimator, LossMode, RolloutCorrectionConfig, RolloutIs, RolloutRs
from dapo_mcore.types import TrainBatch


@dataclass(frozen=True)
class Truths:
    loss: Tensor  # 0-d, differentiable
    metrics: dict[str, float]  # by the actor's names


@dataclass(frozen=True)
class Response:
    """The trained tokens of one response, those of rejected ones apart: [T] each, float64."""

    logprobs: Tensor  # differentiable
    entropy: Tensor  # differentiable
    old: Tensor
    rollout: Tensor
    ref: Tensor | None
    advantages: Tensor

    def only(self, kept: Tensor) -> Response:
        chosen: dict[str, Any] = {name: None if x is None else x[kept] for name, x in vars(self).items()}
        return Response(**chosen)


def objective(logprobs: Tensor, entropy: Tensor, batch: TrainBatch, options: ActorConfig) -> Truths:
    """`logprobs` and `entropy` [N] of the response tokens, in nats."""
    whole = _responses(logprobs, entropy, batch)
    correction = options.rollout_correction
    weights = [_importance_weights(response, correction) for response in whole]
    kept = [_kept(response, correction) for response in whole]
    responses = [response.only(k) for response, k in zip(whole, kept, strict=True)]
    ratios = [_ratio(response, options.loss_mode) for response in responses]
    losses = [
        _policy_term(response, ratio, options) * weight[k] + _penalty(response, options)
        for response, ratio, weight, k in zip(responses, ratios, weights, kept, strict=True)
    ]
    metrics = _gap_metrics(whole) | _correction_metrics(whole, weights, kept, correction)
    advantages = torch.cat([r.advantages * w[k] for r, w, k in zip(responses, weights, kept, strict=True)])
    return Truths(_aggregate(losses, options), metrics | _token_metrics(responses, advantages, ratios, options))


def _responses(logprobs: Tensor, entropy: Tensor, batch: TrainBatch) -> list[Response]:
    lengths = batch.response_lengths.tolist()
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    parts = [x.double().split(lengths) for x in (logprobs, entropy, old, batch.rollout_logprobs, batch.advantages)]
    refs = [None] * len(lengths) if batch.ref_logprobs is None else batch.ref_logprobs.double().split(lengths)
    masks = batch.loss_mask.split(lengths)
    return [
        Response(logp, ent, o, roll, ref, adv).only(mask)
        for logp, ent, o, roll, adv, ref, mask in zip(*parts, refs, masks, strict=True)
    ]


def _importance_weights(response: Response, correction: RolloutCorrectionConfig) -> Tensor:
    """[T]: factor of the policy term."""
    log_rho = response.old - response.rollout
    if correction.rollout_is is RolloutIs.none:
        return torch.ones_like(log_rho)
    if correction.rollout_is is RolloutIs.sequence:
        log_rho = torch.full_like(log_rho, log_rho.sum().item())
    rho, lower, upper = log_rho.exp(), correction.rollout_is_threshold_lower, correction.rollout_is_threshold
    if lower > 0:
        return torch.tensor([r if lower <= r <= upper else 0.0 for r in rho.tolist()], dtype=torch.float64)
    return torch.tensor([min(r, upper) for r in rho.tolist()], dtype=torch.float64)


def _kept(response: Response, correction: RolloutCorrectionConfig) -> Tensor:
    """[T] bool: what the rejection leaves."""
    log_rho = response.old - response.rollout
    upper = correction.rollout_rs_threshold
    lower = correction.rollout_rs_threshold_lower if correction.rollout_rs_threshold_lower > 0 else 1 / upper
    if correction.rollout_rs is RolloutRs.none:
        return torch.ones_like(log_rho, dtype=torch.bool)
    if correction.rollout_rs is RolloutRs.token_k1:
        return torch.tensor([lower <= math.exp(x) <= upper for x in log_rho.tolist()], dtype=torch.bool)
    total = log_rho.sum().item()
    if correction.rollout_rs is RolloutRs.seq_mean_k1:
        total /= max(len(log_rho), 1)
    return torch.full_like(log_rho, lower <= math.exp(total) <= upper, dtype=torch.bool)


def _ratio(response: Response, mode: LossMode) -> Tensor:
    """[T], differentiable."""
    if mode is LossMode.gspo:
        geometric_mean = (response.logprobs - response.old).mean().exp().detach()
        return geometric_mean * response.logprobs.exp() / response.logprobs.detach().exp()
    return (response.logprobs - response.old).exp()


def _policy_term(response: Response, ratio: Tensor, options: ActorConfig) -> Tensor:
    """[T]: what is minimised."""
    low, high, a = 1 - options.clip_ratio_low, 1 + options.clip_ratio_high, response.advantages
    if options.loss_mode is LossMode.cispo:
        return -ratio.clamp(low, high).detach() * a * response.logprobs
    surrogate = torch.minimum(ratio * a, ratio.clamp(low, high) * a)
    if options.loss_mode is LossMode.vanilla:
        surrogate = torch.where(a < 0, torch.maximum(surrogate, options.clip_ratio_c * a), surrogate)
    return -surrogate


def _penalty(response: Response, options: ActorConfig) -> Tensor:
    """[T]: KL penalty minus entropy bonus."""
    penalty = -options.entropy_coeff * response.entropy
    if options.use_kl_loss:
        penalty = penalty + options.kl_loss_coef * _kl(response, options.kl_loss_type)
    return penalty


def _kl(response: Response, estimator: KlEstimator) -> Tensor:
    assert response.ref is not None
    d = response.logprobs - response.ref
    if estimator is KlEstimator.k1:
        return d
    if estimator is KlEstimator.k2:
        return d * d / 2
    if estimator is KlEstimator.k3:
        return torch.exp(-d) - 1 + d
    d = d.clamp(-20, 20)
    return (torch.exp(-d) - 1 + d).clamp(max=10)


def _aggregate(losses: list[Tensor], options: ActorConfig) -> Tensor:
    """0-d, of the token losses of each response."""
    trained = [loss for loss in losses if len(loss)]
    match options.loss_agg_mode.value:
        case "token-mean":
            return torch.cat(trained).mean()
        case "seq-mean-token-sum":
            return torch.stack([loss.sum() for loss in trained]).mean()
        case "seq-mean-token-mean":
            return torch.stack([loss.mean() for loss in trained]).mean()
        case "token-sum-norm":
            return torch.stack([loss.sum() / options.loss_scale_factor for loss in trained]).mean()
        case unknown:
            raise ValueError(f"loss_agg_mode={unknown}: the reference has no definition of it")


def _token_metrics(
    responses: list[Response], a: Tensor, ratios: list[Tensor], options: ActorConfig
) -> dict[str, float]:
    """Means over the tokens that are left. `a`: weighted advantages, as there is nothing to clip of a weight of 0."""
    either, ratio = options.loss_mode is LossMode.cispo, torch.cat(ratios).detach()
    dual = torch.full_like(a, options.loss_mode is LossMode.vanilla, dtype=torch.bool) & (a < 0)
    means = {
        "actor/entropy": torch.cat([r.entropy for r in responses]).detach(),
        "actor/clip_fraction_high": ((a > 0) | either) & (ratio > 1 + options.clip_ratio_high),
        "actor/clip_fraction_low": ((a < 0) | either) & (ratio < 1 - options.clip_ratio_low),
        "actor/clip_fraction_dual": dual & (ratio > options.clip_ratio_c),
        "actor/ratio_mean": ratio,
        "actor/kl_old": -ratio.log(),
    }
    if responses[0].ref is not None:
        means["actor/kl_ref"] = torch.cat([_kl(r, options.kl_loss_type).detach() for r in responses])
    return {name: values.double().mean().item() for name, values in means.items()}


def _gap_metrics(responses: list[Response]) -> dict[str, float]:
    gap = torch.cat([r.old - r.rollout for r in responses])
    rho = gap.exp()
    return {
        "actor/mismatch_abs": gap.abs().mean().item(),
        "actor/mismatch_max": gap.abs().max().item(),
        "actor/mismatch_kl": (rho - 1 - gap).mean().item(),
        "actor/mismatch_beyond_2x": ((rho > 2) | (rho < 0.5)).double().mean().item(),
        "actor/mismatch_effective_sample_size": (rho.sum() ** 2 / (rho**2).sum() / len(rho)).item(),
    }


def _correction_metrics(
    responses: list[Response], weights: list[Tensor], kept: list[Tensor], correction: RolloutCorrectionConfig
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    if correction.rollout_is is not RolloutIs.none:
        free = RolloutCorrectionConfig(rollout_is=correction.rollout_is, rollout_is_threshold=math.inf)
        rho = torch.cat([_importance_weights(response, free) for response in responses])
        outside = (rho > correction.rollout_is_threshold) | (rho < correction.rollout_is_threshold_lower)
        metrics["actor/is_weight"] = torch.cat(weights).mean().item()
        metrics["actor/is_outside_fraction"] = outside.double().mean().item()
    if correction.rollout_rs is not RolloutRs.none:
        metrics["actor/rejected_fraction"] = 1 - torch.cat(kept).double().mean().item()
    return metrics
