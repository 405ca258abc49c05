"""The loss of one token as a function of its log-probability, with its derivative in closed form.

All tensors are [n], one entry per token of the loss mask; nothing here knows the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dapo_kernels.spec import KLEstimator, PolicyLossSpec, Surrogate

LARGEST_LOG_RATIO = 80.0  # exp of it is finite in float32, and far behind any clip
MAX_LOG_RATIO = 20.0  # statistics of the ratio are taken within exp(+-20), so that one outlier leaves them finite


@dataclass(frozen=True, slots=True)
class TokenInputs:
    """What the loss knows of each token besides the logits; all [n] float32 (or float64)."""

    advantages: Tensor
    old_logprobs: Tensor | None  # None: on-policy, the ratio is 1 and its gradient that of the log-probability
    ref_logprobs: Tensor | None
    token_weights: Tensor | None  # factor of everything the token adds to the loss; None: 1

    def select(self, rows: Tensor | slice) -> TokenInputs:
        return TokenInputs(*(None if x is None else x[rows] for x in self._fields()))  # type: ignore[arg-type]

    def to(self, dtype: torch.dtype) -> TokenInputs:
        return TokenInputs(*(None if x is None else x.to(dtype) for x in self._fields()))  # type: ignore[arg-type]

    def _fields(self) -> tuple[Tensor | None, ...]:
        return self.advantages, self.old_logprobs, self.ref_logprobs, self.token_weights


def log_ratio(logprobs: Tensor, tokens: TokenInputs) -> Tensor:
    """At most LARGEST_LOG_RATIO: an infinite ratio would turn the zero gradient behind the clip into NaN."""
    old = logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs
    return (logprobs - old).clamp(max=LARGEST_LOG_RATIO)


def ratio_bounds(advantages: Tensor, spec: PolicyLossSpec) -> tuple[Tensor, Tensor]:
    """Where the clipped surrogate is linear in the ratio: below or above it is constant.

    max(-A r, -A clip(r, 1 - low, 1 + high)), and for A < 0 the minimum of that and -A c, is -A clamp(r, lower, upper)
    with bounds that depend on the sign of A alone.
    """
    negative = advantages < 0
    zeros = torch.zeros_like(advantages)  # of their dtype, which `where` of two numbers would not have
    lower = torch.where(negative, 1.0 - spec.clip_low, zeros)
    upper = torch.where(negative, spec.clip_ratio_c, zeros + (1.0 + spec.clip_high))
    return lower, upper


def clipped_weight(ratio: Tensor, spec: PolicyLossSpec) -> Tensor:
    """CISPO's factor of A logprob, whatever the sign of A."""
    return ratio.clamp(1.0 - spec.clip_low, 1.0 + spec.clip_high)


def token_loss(logprobs: Tensor, tokens: TokenInputs, spec: PolicyLossSpec) -> Tensor:
    """Policy term plus KL penalty of each token [n], without its weight; differentiable in `logprobs`."""
    ratio = log_ratio(logprobs, tokens).exp()
    match spec.surrogate:
        case Surrogate.CLIPPED:
            loss = -tokens.advantages * ratio.clamp(*ratio_bounds(tokens.advantages, spec))
        case Surrogate.CISPO:
            loss = -tokens.advantages * clipped_weight(ratio, spec).detach() * logprobs
    if tokens.ref_logprobs is not None and spec.kl_coeff != 0:
        loss = loss + spec.kl_coeff * kl_estimate(logprobs, tokens.ref_logprobs, spec.kl_estimator)
    return loss


def token_loss_derivative(logprobs: Tensor, tokens: TokenInputs, spec: PolicyLossSpec) -> Tensor:
    """Weight times d token_loss / d logprobs [n]; exactly 0 where the clip is constant and no KL penalty acts."""
    ratio = log_ratio(logprobs, tokens).exp()
    match spec.surrogate:
        case Surrogate.CLIPPED:
            lower, upper = ratio_bounds(tokens.advantages, spec)
            inside = (ratio >= lower) & (ratio <= upper)
            derivative = torch.where(inside, -tokens.advantages * ratio, 0.0)
        case Surrogate.CISPO:
            derivative = -tokens.advantages * clipped_weight(ratio, spec)
    if tokens.ref_logprobs is not None and spec.kl_coeff != 0:
        derivative = derivative + spec.kl_coeff * kl_derivative(logprobs, tokens.ref_logprobs, spec.kl_estimator)
    if tokens.token_weights is not None:
        derivative = derivative * tokens.token_weights
    # a token without a log-probability (NaN) stays visible
    return torch.where(logprobs.isnan(), logprobs, derivative)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    difference = logprobs - ref_logprobs
    match estimator:
        case KLEstimator.K1:
            return difference
        case KLEstimator.K2:
            return difference.square() / 2
        case KLEstimator.K3:
            return torch.expm1(-difference) + difference
        case KLEstimator.LOW_VAR:
            difference = difference.clamp(-20.0, 20.0)
            return (torch.expm1(-difference) + difference).clamp(-10.0, 10.0)


def kl_derivative(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """d kl_estimate / d logprobs."""
    difference = logprobs - ref_logprobs
    match estimator:
        case KLEstimator.K1:
            return torch.ones_like(difference)
        case KLEstimator.K2:
            return difference
        case KLEstimator.K3:
            return -torch.expm1(-difference)
        case KLEstimator.LOW_VAR:
            within = difference.abs() <= 20.0
            within &= kl_estimate(logprobs, ref_logprobs, KLEstimator.K3) <= 10.0
            return torch.where(within, -torch.expm1(-difference), 0.0)


def bonus_weights(like: Tensor, tokens: TokenInputs, spec: PolicyLossSpec) -> Tensor | None:
    """Factor [n] of each token's entropy in what is subtracted from the loss; None: no bonus."""
    if spec.entropy_coeff == 0:
        return None
    weights = torch.ones_like(like) if tokens.token_weights is None else tokens.token_weights.to(like.dtype)
    return spec.entropy_coeff * weights


def clip_hits(ratio: Tensor, advantages: Tensor, spec: PolicyLossSpec) -> dict[str, Tensor]:
    """[n] bool each: tokens the clip holds back. CISPO's bounds do not look at the sign of A."""
    above, below = ratio > 1 + spec.clip_high, ratio < 1 - spec.clip_low
    match spec.surrogate:
        case Surrogate.CLIPPED:
            negative, positive = advantages < 0, advantages > 0
            return {
                "clip_high": positive & above,
                "clip_low": negative & below,
                "clip_dual": negative & (ratio > spec.clip_ratio_c),
            }
        case Surrogate.CISPO:
            return {"clip_high": above, "clip_low": below, "clip_dual": torch.zeros_like(above)}


def policy_statistics(
    logprobs: Tensor, entropy: Tensor, tokens: TokenInputs, spec: PolicyLossSpec
) -> dict[str, Tensor]:
    """Unweighted sums over the n tokens, 0-d each; `ratio_max` is a maximum (0 without). Nobody has divided them."""
    logs = log_ratio(logprobs, tokens)
    bounded = logs.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    sums = {
        "num_tokens": torch.ones_like(logprobs),
        **clip_hits(logs.exp(), tokens.advantages, spec),
        "ratio": bounded,
        "ratio_squared": bounded.square(),
        "old_kl": -logs.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO),  # k1 estimate of KL(old || policy)
        "entropy": entropy,
    }
    if tokens.ref_logprobs is not None:
        sums["kl"] = kl_estimate(logprobs, tokens.ref_logprobs, spec.kl_estimator)
    statistics = {name: values.sum(dtype=logprobs.dtype) for name, values in sums.items()}
    statistics["ratio_max"] = torch.cat([bounded, bounded.new_zeros(1)]).amax()
    return statistics
