"""The loss options the certificate covers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dapo_mcore.config import (
    ActorConfig,
    KlEstimator,
    LossAggMode,
    LossMode,
    MoeConfig,
    RolloutCorrectionConfig,
    RolloutIs,
    RolloutRs,
    TowerTraining,
    VisionConfig,
)
from dapo_mcore.types import TrainBatch
from tools.certificate.experts import random_routes
from tools.certificate.layouts import DENSE, MOE, SEEING_DENSE, SEEING_LAYOUTS, SEEING_MOE
from tools.certificate.reference import random_batch
from tools.certificate.vision import with_images

# The first is longer than the budget; data-parallel ranks need different numbers of micro-batches.
UNEVEN = ((5, 70), (3, 20), (9, 13), (2, 30), (7, 7))
# With its image the fourth is 16 tokens long, and the cut over two context-parallel ranks runs through the image.
THROUGH_AN_IMAGE = (*UNEVEN[:3], (2, 6), UNEVEN[4])
BUDGET = 40  # tokens of a micro-batch
MAX_LAYERS = 16  # of the models: see layouts.model_sizes


@dataclass(frozen=True)
class Option:
    """What a loss is computed with and on."""

    actor: Mapping[str, Any] = field(default_factory=dict)  # fields of ActorConfig
    temperature: float = 1.0
    on_policy: bool = False  # no old log-probabilities: the ratio is exactly 1
    gap: float | None = None  # deviation of log pi_old - log pi_rollout of a token; None: far apart
    reference: bool = False  # log-probabilities of a reference model
    lengths: tuple[tuple[int, int], ...] = UNEVEN  # prompt and response of each sequence, tokens
    of_experts: bool = False  # means nothing to a dense model
    of_images: bool = False  # nor this to one of text

    def actor_config(self, **settings: Any) -> ActorConfig:
        return ActorConfig(**{"ppo_max_token_len_per_gpu": BUDGET, **self.actor, **settings})

    def batch(self, images: bool = False) -> TrainBatch:
        """`images`: of some of the sequences, whose prompts are longer by their tokens."""
        batch = random_batch(0, list(self.lengths), old_logprobs=not self.on_policy)
        batch = with_images(batch) if images else batch
        noise = torch.randn(2, len(batch.loss_mask), generator=torch.Generator().manual_seed(1))
        if self.gap is not None:
            assert batch.old_logprobs is not None
            batch = replace(batch, rollout_logprobs=batch.old_logprobs + self.gap * noise[0])
        if self.reference:
            batch = replace(batch, ref_logprobs=-5.0 + noise[1])
        batch = replace(batch, temperature=self.temperature)
        return replace(batch, routes=random_routes(batch, layers=MAX_LAYERS, experts=8, top_k=2))


def seeing(train: TowerTraining, *, split: bool = False, **option: Any) -> Option:
    return Option({"vision": VisionConfig(train=train, split_images=split)}, of_images=True, **option)


def corrected(gap: float | None = None, actor: Mapping[str, Any] | None = None, **correction: Any) -> Option:
    return Option({**(actor or {}), "rollout_correction": RolloutCorrectionConfig(**correction)}, gap=gap)


BOUNDS: dict[str, Any] = {
    "rollout_rs_threshold": 5.0,
    "rollout_rs_threshold_lower": 0.4,
}  # one response of the five is outside
BASE = "DAPO"  # on every layout; the vision tower is frozen
TOWER, SPLIT = "tower trained", "tower trained, images split"
TEXT_RANK = "tower trained, one rank sees text"  # where it has a rank for each of two responses
OPTIONS: dict[str, Option] = {
    BASE: Option(),
    "one response": Option(lengths=((4, 21),), on_policy=True),
    "on-policy": Option(on_policy=True),
    "symmetric clip": Option({"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}),
    "dual clip 2": Option({"clip_ratio_c": 2.0}),
    "entropy bonus": Option({"entropy_coeff": 0.01}),
    "temperature 1.3": Option(temperature=1.3),
    "GSPO": Option({"loss_mode": LossMode.gspo, "loss_agg_mode": LossAggMode["seq-mean-token-mean"]}),
    "CISPO": Option({"loss_mode": LossMode.cispo}),
    **{
        name: Option({"loss_agg_mode": LossAggMode[name], "entropy_coeff": 0.01, "loss_scale_factor": 100})
        for name in ("seq-mean-token-sum", "seq-mean-token-mean", "token-sum-norm")
    },
    **{
        f"KL {kl.name}": Option({"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": kl}, reference=True)
        for kl in KlEstimator
    },
    "KL and entropy, mean over responses": Option(
        {
            "use_kl_loss": True,
            "kl_loss_coef": 0.1,
            "entropy_coeff": 0.01,
            "loss_agg_mode": LossAggMode["seq-mean-token-mean"],
        },
        reference=True,
    ),
    "TIS": corrected(rollout_is=RolloutIs.token),
    "TIS of sequences": corrected(0.15, rollout_is=RolloutIs.sequence),
    "IcePop": corrected(rollout_is=RolloutIs.token, rollout_is_threshold_lower=0.5, rollout_is_threshold=5.0),
    "masked tokens": corrected(rollout_rs=RolloutRs.token_k1),
    "MIS": corrected(0.15, rollout_rs=RolloutRs.seq_sum_k1, **BOUNDS),
    "MIS, mean over responses": corrected(
        0.15, {"loss_agg_mode": LossAggMode["seq-mean-token-mean"]}, rollout_rs=RolloutRs.seq_sum_k1, **BOUNDS
    ),
    "GSPO, MIS by geometric mean, TIS of sequences": corrected(
        0.15,
        {"loss_mode": LossMode.gspo},
        rollout_rs=RolloutRs.seq_mean_k1,
        rollout_rs_threshold=1.02,
        rollout_is=RolloutIs.sequence,
    ),
    "router losses": Option({"moe": MoeConfig(seq_aux_loss_coeff=0.1, z_loss_coeff=0.01)}, of_experts=True),
    "router replay": Option({"moe": MoeConfig(router_replay=True)}, of_experts=True),
    "router replay and losses": Option(
        {"moe": MoeConfig(router_replay=True, seq_aux_loss_coeff=0.1, z_loss_coeff=0.01)}, of_experts=True
    ),
    "mergers trained": seeing(TowerTraining.mergers),
    TOWER: seeing(TowerTraining.all),
    SPLIT: seeing(TowerTraining.all, split=True, lengths=THROUGH_AN_IMAGE),
    TEXT_RANK: seeing(TowerTraining.all, lengths=((4, 61), (4, 63))),
}

# Every option runs on these (layout, family), the base option on all,
OPTION_LAYOUTS = (
    ("single", DENSE),
    ("DP2", DENSE),
    ("TP2+SP", MOE),
    ("CP2", MOE),
    ("PP2", DENSE),
    ("PP2xCP2xEP2", MOE),
)
# and single options where a layout has a fault of its own to make: choices queued for an interleaved recomputation, a
# rank without work that still holds half of every expert, a vision tower that ranks have in common or share out.
OPTION_CASES = (
    ("PP2xVPP2, recompute full", MOE, "router replay"),
    ("DP2xETP2", MOE, "one response"),
    *((layout, SEEING_MOE, TOWER) for layout in SEEING_LAYOUTS),
    ("TP2", SEEING_DENSE, SPLIT),
    *((layout, SEEING_MOE, SPLIT) for layout in ("TP2+SP", "CP2xEP2, overlap", "TP2+SPxCP2")),
    *((layout, SEEING_MOE, "mergers trained") for layout in ("DP2, overlap", "TP2+SP", "PP2")),
    *((layout, SEEING_MOE, TEXT_RANK)
      for layout in ("DP2, overlap", "EP2", "CP2xEP2, overlap")),
)  # fmt: skip
