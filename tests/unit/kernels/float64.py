"""The loss as its definition reads, token by token in float64, differentiated by autograd. It shares no code."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Truth(NamedTuple):
    loss: Tensor  # 0-d, differentiable
    logprobs: Tensor  # [T]
    entropy: Tensor  # [T]
    counts: dict[str, float]


def policy_loss(
    logits: Tensor, targets: Tensor, advantages: Tensor, loss_mask: Tensor, *, clip_low: float, clip_high: float,
    clip_ratio_c: float, temperature: float, entropy_coeff: float, kl_coeff: float, kl_estimator: str,
    surrogate: str = "clipped",
    old_logprobs: Tensor | None = None, ref_logprobs: Tensor | None = None, token_weights: Tensor | None = None,
    scale: float = 1.0,
) -> Truth:  # fmt: skip
    """logits [T, V] float64; only the rows of `loss_mask` are looked at."""
    total = logits.sum() * 0.0 if logits.isfinite().all() else torch.zeros((), dtype=torch.float64)
    logprobs, entropies = torch.zeros(2, len(targets), dtype=torch.float64)
    counts = {"num_tokens": 0, "clip_high": 0, "clip_low": 0, "clip_dual": 0, "ratio": 0.0, "ratio_max": 0.0, "kl": 0.0}
    for t in loss_mask.nonzero()[:, 0].tolist():
        row = logits[t] / temperature
        row = row[row > -math.inf] if row[targets[t]] > -math.inf else row
        logp = (logits[t, targets[t]] / temperature) - torch.logsumexp(row, 0)
        p = torch.softmax(row, 0)
        entropy = -(p * torch.log(p.clamp_min(1e-300))).sum()
        old = logp.detach() if old_logprobs is None else old_logprobs[t].double()
        a, r = advantages[t].double(), torch.exp(logp - old)
        if surrogate == "cispo":
            term = -min(max(float(r.detach()), 1 - clip_low), 1 + clip_high) * a * logp
        else:
            term = max(-a * r, -a * r.clamp(1 - clip_low, 1 + clip_high))
            if a < 0 and clip_ratio_c < math.inf:
                term = min(term, -a * clip_ratio_c)
        if ref_logprobs is not None:
            penalty = kl_penalty(logp - ref_logprobs[t].double(), kl_estimator)
            term = term + kl_coeff * penalty
            counts["kl"] += float(penalty.detach())
        weight = 1.0 if token_weights is None else token_weights[t].double()
        total = total + weight * (term - entropy_coeff * entropy)
        logprobs[t], entropies[t] = logp.detach(), entropy.detach()
        counts["num_tokens"] += 1
        either = surrogate == "cispo"
        counts["clip_high"] += int((either or a > 0) and r > 1 + clip_high)
        counts["clip_low"] += int((either or a < 0) and r < 1 - clip_low)
        counts["clip_dual"] += int(not either and a < 0 and r > clip_ratio_c)
        r = r.detach()
        bounded = float(r.clamp(math.exp(-20), math.exp(20)))
        counts["ratio"] += bounded
        counts["ratio_max"] = max(counts["ratio_max"], bounded)
    return Truth(scale * total, logprobs, entropies, counts)


def kl_penalty(d: Tensor, estimator: str) -> Tensor:
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d * d
    if estimator == "k3":
        return torch.exp(-d) - 1 + d
    clamped = max(min(d, torch.tensor(20.0)), torch.tensor(-20.0))
    return min(torch.exp(-clamped) - 1 + clamped, torch.tensor(10.0, dtype=torch.float64))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, and the plain norm where the expected one is 0."""
    difference = (actual.double() - expected.double()).norm()
    norm = expected.double().norm()
    return float(difference / norm) if norm > 0 else float(difference)
