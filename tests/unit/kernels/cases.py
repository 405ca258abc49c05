"""Generated inputs: shapes, masks, every side of every clip, extreme logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from dapo_kernels import KLEstimator, PolicyLossSpec, Surrogate
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.kernels import float64

# Distances of the log-ratio that keep clear of every bound's logarithm, so that rounding cannot move a token across.
LOG_RATIOS = (0.0, 0.1, -0.1, 0.4, -0.4, 1.5, -1.5, 3.0, -3.0, 30.0, -30.0)
KL_DISTANCES = (0.0, 0.001, 0.1, -0.5, 1.0, -1.5, 4.0, -4.0)


def examples(count: int) -> settings:
    """`count` examples, the same in every run; --hypothesis-profile=thorough draws 40 times as many, anew each time."""
    thorough = settings.default.max_examples > 100
    scaled = count * settings.default.max_examples // 100 if thorough else count
    return settings(max_examples=scaled, deadline=None, derandomize=not thorough, database=None)


@dataclass(frozen=True)
class Case:
    tokens: int
    hidden_size: int
    vocabulary: int
    seed: int
    spec: PolicyLossSpec
    on_policy: bool = False
    weighted: bool = True
    mask_rate: float = 0.7
    magnitude: float = 1.0  # of the logits
    excluded: int = 0  # columns at -inf (from logits only)
    scale: float = 0.37
    chunk_rows: int = 3
    double: bool = False
    made: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def tensors(self) -> dict[str, Tensor]:
        """hidden, weight and logits float64 (exact in float32); everything of a token in the masked rows is NaN."""
        if self.made:
            return self.made
        g = torch.Generator().manual_seed(self.seed)
        hidden = torch.randn(self.tokens, self.hidden_size, generator=g).double()
        weight = (torch.randn(self.vocabulary, self.hidden_size, generator=g) * self.hidden_size**-0.5).double()
        logits = (torch.randn(self.tokens, self.vocabulary, generator=g) * self.magnitude).double()
        targets = torch.randint(0, self.vocabulary, (self.tokens,), generator=g)
        excluded = torch.randperm(self.vocabulary, generator=g)[: self.excluded]
        logits[:, excluded] = -math.inf
        for row in range(self.tokens):  # a sampled token has a probability
            while self.excluded and targets[row] in excluded:
                targets[row] = (targets[row] + 1) % self.vocabulary
        self.made.update(
            hidden=hidden, weight=weight, logits=logits, targets=targets,
            advantages=torch.randn(self.tokens, generator=g) * (torch.rand(self.tokens, generator=g) > 0.1),
            loss_mask=torch.rand(self.tokens, generator=g) < self.mask_rate,
            log_ratios=torch.tensor(LOG_RATIOS)[torch.randint(0, len(LOG_RATIOS), (self.tokens,), generator=g)],
            kl_distances=torch.tensor(KL_DISTANCES)[torch.randint(0, len(KL_DISTANCES), (self.tokens,), generator=g)],
            token_weights=torch.rand(self.tokens, generator=g) * 2,
        )  # fmt: skip
        return self.made

    def inputs(self, logits: Tensor) -> dict[str, Any]:
        """Arguments both sides take, with old and reference log-probabilities at the chosen distances."""
        made, mask = self.tensors(), self.tensors()["loss_mask"]
        scaled = (logits.detach() / self.spec.temperature).double()
        chosen = scaled.gather(1, made["targets"][:, None])[:, 0] - torch.logsumexp(scaled, -1)
        masked_out = torch.where(mask, 0.0, math.nan)
        dtype = torch.float64 if self.double else torch.float32
        return {
            "targets": torch.where(mask, made["targets"], -100),
            "advantages": made["advantages"] + masked_out,
            "loss_mask": mask,
            "old_logprobs": None if self.on_policy else (chosen - made["log_ratios"] + masked_out).to(dtype),
            "ref_logprobs": (chosen - made["kl_distances"] + masked_out).to(dtype) if self.spec.kl_coeff else None,
            "token_weights": made["token_weights"] + masked_out if self.weighted else None,
            "scale": self.scale,
        }

    def truth(self, logits: Tensor, inputs: dict[str, Any]) -> float64.Truth:
        spec = self.spec
        return float64.policy_loss(
            logits, **inputs, clip_low=spec.clip_low, clip_high=spec.clip_high, clip_ratio_c=spec.clip_ratio_c,
            temperature=spec.temperature, entropy_coeff=spec.entropy_coeff, kl_coeff=spec.kl_coeff,
            kl_estimator=str(spec.kl_estimator), surrogate=str(spec.surrogate),
        )  # fmt: skip


SPECS = st.builds(
    PolicyLossSpec,
    clip_low=st.sampled_from([0.2, 0.5]),
    clip_high=st.sampled_from([0.28, 0.2]),
    clip_ratio_c=st.sampled_from([10.0, 3.0]),
    temperature=st.sampled_from([1.0, 0.6, 1.7]),
    entropy_coeff=st.sampled_from([0.0, 0.0, 0.05, -0.02]),
    kl_coeff=st.sampled_from([0.0, 0.0, 0.1]),
    kl_estimator=st.sampled_from(list(KLEstimator)),
    surrogate=st.sampled_from([Surrogate.CLIPPED, Surrogate.CLIPPED, Surrogate.CISPO]),
)


# At a log-probability of -1e4 float32 holds old and reference values to 1e-3 only: no comparison with them is sharp.
SPECS_WITHOUT_KL = SPECS.map(lambda spec: replace(spec, kl_coeff=0.0))
VOCABULARIES = st.integers(1, 300)


def cases(vocabularies: st.SearchStrategy[int] = VOCABULARIES, **fixed: Any) -> st.SearchStrategy[Case]:
    drawn: dict[str, Any] = {
        "tokens": st.integers(0, 11),
        "hidden_size": st.integers(1, 19),
        "vocabulary": vocabularies,
        "seed": st.integers(0, 2**31),
        "spec": SPECS,
        "on_policy": st.booleans(),
        "weighted": st.booleans(),
        "mask_rate": st.sampled_from([0.0, 0.5, 0.8, 1.0]),
        "scale": st.sampled_from([1.0, 1e-4]),
        "chunk_rows": st.integers(1, 12),
    }
    return st.builds(Case, **{name: value for name, value in drawn.items() if name not in fixed}, **fixed)
