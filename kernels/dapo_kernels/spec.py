"""What the loss is: every option that changes its value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum


class KLEstimator(StrEnum):
    """Estimators of KL(policy || reference) from one sampled token, with d = logprob - ref_logprob (Schulman 2020)."""

    K1 = "k1"  # d
    K2 = "k2"  # d^2 / 2
    K3 = "k3"  # exp(-d) - 1 + d
    LOW_VAR = "low_var_kl"  # k3 with d clamped to +-20 and the value to at most 10; no gradient beyond


class Surrogate(StrEnum):
    """What the clip does to a token. The ratio r is exp(logprob - old_logprob); A is its advantage."""

    CLIPPED = "clipped"  # DAPO eq. 8 with dual clip: -A r inside the bounds of the sign of A, constant outside
    CISPO = "cispo"  # arXiv:2506.13585: -A sg[clip(r, 1 - clip_low, 1 + clip_high)] logprob; every token learns


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLossSpec:
    """Loss of a token; by default the decoupled clip of DAPO (arXiv:2503.14476) and dual clip (arXiv:1912.09729)."""

    clip_low: float = 0.2  # epsilon_low: the ratio's lower bound is 1 - clip_low
    clip_high: float = 0.28  # epsilon_high: its upper bound is 1 + clip_high
    clip_ratio_c: float = 10.0  # dual clip: bound of the ratio where the advantage is negative; math.inf: none
    temperature: float = 1.0  # divides the logits
    entropy_coeff: float = 0.0  # weight of the entropy bonus, subtracted from the loss
    kl_coeff: float = 0.0  # weight of the KL penalty against ref_logprobs
    kl_estimator: KLEstimator = KLEstimator.K3
    surrogate: Surrogate = Surrogate.CLIPPED

    def __post_init__(self) -> None:
        _require(0 <= self.clip_low < 1, "clip_low", self.clip_low, "must be in [0, 1)")
        _require(0 <= self.clip_high < math.inf, "clip_high", self.clip_high, "must be finite and at least 0")
        _require(self.clip_ratio_c > 1, "clip_ratio_c", self.clip_ratio_c, "must exceed 1; math.inf switches it off")
        _require(0 < self.temperature < math.inf, "temperature", self.temperature, "must be finite and above 0")
        _require(math.isfinite(self.entropy_coeff), "entropy_coeff", self.entropy_coeff, "must be finite")
        _require(math.isfinite(self.kl_coeff), "kl_coeff", self.kl_coeff, "must be finite")
        _require(self.kl_estimator in tuple(KLEstimator), "kl_estimator", self.kl_estimator, "use a KLEstimator")
        _require(self.surrogate in tuple(Surrogate), "surrogate", self.surrogate, "use a Surrogate")


def _require(condition: bool, name: str, value: object, reason: str) -> None:
    if not condition:
        raise ValueError(f"PolicyLossSpec.{name}={value}: {reason}")
