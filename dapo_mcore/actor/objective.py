"""What an update minimises: the options of the loss as values and functions, chosen once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from dapo_kernels import KLEstimator, PolicyLossSpec, Surrogate

from dapo_mcore.algo import aggregation, mismatch
from dapo_mcore.algo.aggregation import Aggregation
from dapo_mcore.algo.mismatch import Correction
from dapo_mcore.config import ActorConfig, LossMode, RolloutCorrectionConfig, RolloutIs, RolloutRs
from dapo_mcore.observe.metrics import Ratio
from dapo_mcore.types import TrainBatch

IS_LEVELS = {RolloutIs.token: mismatch.of_token, RolloutIs.sequence: mismatch.of_sequence}
RS_LEVELS = {
    RolloutRs.token_k1: mismatch.of_token,
    RolloutRs.seq_sum_k1: mismatch.of_sequence,
    RolloutRs.seq_mean_k1: mismatch.of_sequence_mean,
}


@dataclass(frozen=True, slots=True)
class Objective:
    spec: PolicyLossSpec  # of one token, at temperature 1
    ratio_of_sequence: bool  # the ratio is the geometric mean over the response
    aggregate: Aggregation
    correct: Correction  # comes first: the aggregation must see the final mask
    corrects: bool  # it does something, which takes the trainer's own old log-probabilities


def make_objective(options: ActorConfig) -> Objective:
    """The objective that `options` describe; the temperature comes with each batch."""
    sequence = options.loss_mode is LossMode.gspo
    spec = PolicyLossSpec(
        clip_low=options.clip_ratio_low,
        clip_high=options.clip_ratio_high,
        clip_ratio_c=math.inf if sequence else options.clip_ratio_c,
        entropy_coeff=options.entropy_coeff,
        kl_coeff=options.kl_loss_coef if options.use_kl_loss else 0.0,
        kl_estimator=KLEstimator(options.kl_loss_type.value),
        surrogate=Surrogate.CISPO if options.loss_mode is LossMode.cispo else Surrogate.CLIPPED,
    )
    steps = _corrections(options.rollout_correction)
    return Objective(spec, sequence, _aggregation(options), partial(_correct, steps=steps), corrects=bool(steps))


def _aggregation(options: ActorConfig) -> Aggregation:
    modes: dict[str, Aggregation] = {
        "token-mean": aggregation.token_mean,
        "seq-mean-token-sum": aggregation.seq_mean_token_sum,
        "seq-mean-token-mean": aggregation.seq_mean_token_mean,
        "token-sum-norm": partial(aggregation.token_sum_norm, scale_factor=options.loss_scale_factor),
    }
    return modes[options.loss_agg_mode.value]


def _corrections(options: RolloutCorrectionConfig) -> list[Correction]:
    """Weights of all trained tokens, then what is rejected, as verl does."""
    steps: list[Correction] = []
    if options.rollout_is is not RolloutIs.none:
        steps.append(
            partial(
                mismatch.importance_weighted,
                level=IS_LEVELS[options.rollout_is],
                lower=options.rollout_is_threshold_lower,
                upper=options.rollout_is_threshold,
            )
        )
    if options.rollout_rs is not RolloutRs.none:
        upper = options.rollout_rs_threshold
        lower = options.rollout_rs_threshold_lower or 1 / upper
        steps.append(partial(mismatch.rejected, level=RS_LEVELS[options.rollout_rs], lower=lower, upper=upper))
    return steps


def _correct(batch: TrainBatch, steps: Sequence[Correction]) -> tuple[TrainBatch, dict[str, Ratio]]:
    metrics: dict[str, Ratio] = {}
    for step in steps:
        batch, found = step(batch)
        metrics |= found
    return batch, metrics
