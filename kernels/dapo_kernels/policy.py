"""The loss of one token as a function of its log-probability, with its derivative in closed form.

All tensors are [n], one entry per token of the loss mask; nothing here knows the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dapo_kernels.spec import KLEstimator, PolicyLossSpec

LARGEST_LOG_RATIO = 80.0  # exp of it is finite in float32, and far behind any clip
MAX_LOG_RATIO = 20.0  # statistics of the ratio are taken within exp(+-20), so that one outlier leaves them finite


@dataclass(frozen=True, slots=True)
class TokenInputs:
    """What the loss knows of each token besides the logits; all [n] float32 (or float64)."""

    advantages: Tensor
    old_logprobs: Tensor | None  # None: on-policy, the ratio is 1 and its gradient that of the log-probability
    ref_logprobs: Tensor | None
    token_weights: Tensor | None  # factor of the policy term alone

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


def token_loss(logprobs: Tensor, tokens: TokenInputs, spec: PolicyLossSpec) -> Tensor:
    """Policy term plus KL penalty of each token [n]; differentiable in `logprobs`. The entropy bonus is apart."""
    lower, upper = ratio_bounds(tokens.advantages, spec)
    loss = -tokens.advantages * log_ratio(logprobs, tokens).exp().clamp(lower, upper)
    if tokens.token_weights is not None:
        loss = loss * tokens.token_weights
    if tokens.ref_logprobs is not None and spec.kl_coeff != 0:
        loss = loss + spec.kl_coeff * kl_estimate(logprobs, tokens.ref_logprobs, spec.kl_estimator)
    return loss


def token_loss_derivative(logprobs: Tensor, tokens: TokenInputs, spec: PolicyLossSpec) -> Tensor:
    """d token_loss / d logprobs [n]; exactly 0 where the ratio is clipped and no KL penalty acts."""
    lower, upper = ratio_bounds(tokens.advantages, spec)
    ratio = log_ratio(logprobs, tokens).exp()
    inside = (ratio >= lower) & (ratio <= upper)
    derivative = torch.where(inside, -tokens.advantages * ratio, 0.0)
    if tokens.token_weights is not None:
        derivative = derivative * tokens.token_weights
    if tokens.ref_logprobs is not None and spec.kl_coeff != 0:
        derivative = derivative + spec.kl_coeff * kl_derivative(logprobs, tokens.ref_logprobs, spec.kl_estimator)
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


def policy_statistics(
    logprobs: Tensor, entropy: Tensor, tokens: TokenInputs, spec: PolicyLossSpec
) -> dict[str, Tensor]:
    """Sums over the n tokens, 0-d each; `ratio_max` is a maximum (0 without tokens). Nobody has divided them."""
    logs = log_ratio(logprobs, tokens)
    ratio, advantages = logs.exp(), tokens.advantages
    bounded = logs.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    sums = {
        "num_tokens": torch.ones_like(logprobs),
        "clip_high": (advantages > 0) & (ratio > 1 + spec.clip_high),
        "clip_low": (advantages < 0) & (ratio < 1 - spec.clip_low),
        "clip_dual": (advantages < 0) & (ratio > spec.clip_ratio_c),
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
