"""The options of the loss, through the actor's loss head, against what verl and TRL compute; so is the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dapo_mcore.actor.loss_head import policy_loss_head
from dapo_mcore.actor.objective import make_objective
from dapo_mcore.actor.packing import MicroBatch
from dapo_mcore.actor.policy_model import HeadInput
from dapo_mcore.config import (
    ActorConfig,
    LossAggMode,
    LossMode,
    RolloutCorrectionConfig,
    RolloutIs,
    RolloutRs,
)
from dapo_mcore.types import TrainBatch
from tools.certificate.objective import objective

ORACLE = Path(__file__).parents[2] / "data" / "oracle"
LossOf = Callable[[Tensor, TrainBatch, ActorConfig], Tensor]


def by_loss_head(logprobs: Tensor, batch: TrainBatch, options: ActorConfig) -> Tensor:
    """`logprobs` [N] as those of a vocabulary of two, of which token 0 was sampled."""
    chosen = make_objective(options)
    corrected, _ = chosen.correct(batch)
    places = corrected.loss_mask.nonzero()[:, 0]
    logits = torch.stack([logprobs, torch.log1p(-logprobs.exp())], dim=-1)[places]
    nothing: Any = None
    micro_batch = MicroBatch(
        nothing, nothing, torch.arange(len(places)), torch.zeros_like(places), places, nothing, nothing
    )
    head = HeadInput(logits, torch.eye(2).double(), vocab_start=0, vocab_size=2, group=None)
    return policy_loss_head(corrected, chosen)(micro_batch, head).loss


def by_reference(logprobs: Tensor, batch: TrainBatch, options: ActorConfig) -> Tensor:
    return objective(logprobs, torch.zeros_like(logprobs), batch, options).loss


BOTH = pytest.mark.parametrize("loss_of", [by_loss_head, by_reference])


def batch_of(values: dict[str, Tensor]) -> TrainBatch:
    """The peers' padded batch: responses of equal length, in float64."""
    mask = values["input.mask"]
    lengths = torch.full((len(mask),), mask.shape[1])
    return TrainBatch(
        token_ids=torch.zeros(mask.numel(), dtype=torch.int64),
        prompt_lengths=0 * lengths,
        response_lengths=lengths,
        loss_mask=mask.flatten(),
        advantages=values["input.advantages"][:, None].expand_as(mask).flatten(),
        rollout_logprobs=values["input.rollout_logprobs"].flatten(),
        old_logprobs=values["input.old_logprobs"].flatten(),
    )


def assert_same(loss_of: LossOf, peer: str, name: str, options: dict[str, Any], factor: float = 1.0) -> None:
    """Loss and gradient times `factor` are the peer's, to the rounding of weights in float32."""
    values = load_file(ORACLE / f"{peer}.safetensors")
    logprobs = values["input.logprobs"].requires_grad_()
    loss = factor * loss_of(logprobs.flatten(), batch_of(values), ActorConfig(**{"loss_scale_factor": 1, **options}))
    torch.testing.assert_close(loss.detach(), values[f"{name}.loss"], rtol=3e-7, atol=1e-9)
    gradient, wanted = torch.autograd.grad(loss, logprobs)[0], values[f"{name}.gradient.logprobs"]
    assert (gradient - wanted).abs().max() <= 3e-7 * wanted.abs().max()


@BOTH
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("mode", [LossMode.gspo, LossMode.cispo])
def test_ratios_of_responses_and_clipped_weights_are_those_of_verl(
    mode: LossMode, aggregation: str, loss_of: LossOf
) -> None:
    options = {"loss_mode": mode, "loss_agg_mode": LossAggMode[aggregation]}
    assert_same(loss_of, "verl", f"{mode.name}.{aggregation}", options)


CORRECTIONS: dict[str, dict[str, Any]] = {
    "tis": {"rollout_is": RolloutIs.token, "rollout_is_threshold": 1.5},
    "icepop": {"rollout_is": RolloutIs.token, "rollout_is_threshold": 1.6, "rollout_is_threshold_lower": 0.7},
    "sequence_tis": {"rollout_is": RolloutIs.sequence},
    "token_k1": {"rollout_rs": RolloutRs.token_k1},
    "seq_sum_k1": {"rollout_rs": RolloutRs.seq_sum_k1},
    "seq_mean_k1": {
        "rollout_rs": RolloutRs.seq_mean_k1, "rollout_rs_threshold": 1 / 0.9375, "rollout_rs_threshold_lower": 0.9375
    },
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("name", CORRECTIONS)
def test_the_correction_of_the_mismatch_is_that_of_verl(name: str, loss_of: LossOf) -> None:
    assert_same(
        loss_of, "verl", f"correction.{name}", {"rollout_correction": RolloutCorrectionConfig(**CORRECTIONS[name])}
    )


def all_over_trained_responses() -> float:
    """TRL divides by all responses; those without a trained token count nowhere here."""
    mask = load_file(ORACLE / "trl.safetensors")["input.mask"]
    return mask.any(dim=1).sum().item() / len(mask)


@BOTH
@pytest.mark.parametrize(
    ("name", "options", "is_mean_over_responses"),
    [
        ("gspo", {"loss_mode": LossMode.gspo, "loss_agg_mode": LossAggMode["seq-mean-token-mean"]}, True),
        ("grpo", {"loss_agg_mode": LossAggMode["seq-mean-token-mean"], "clip_ratio_c": 1e9}, True),
        ("dr_grpo", {"loss_agg_mode": LossAggMode["token-sum-norm"], "loss_scale_factor": 100, "clip_ratio_c": 1e9},
         True),
        ("cispo", {"loss_mode": LossMode.cispo, "clip_ratio_low": 1 - 1e-9, "clip_ratio_high": 1.0}, False),
        ("tis", {"clip_ratio_c": 1e9, "rollout_correction":
                 RolloutCorrectionConfig(rollout_is=RolloutIs.token, rollout_is_threshold=1.5)}, False),
    ],
)  # fmt: skip
def test_the_variants_they_share_are_those_of_trl(
    name: str, options: dict[str, Any], is_mean_over_responses: bool, loss_of: LossOf
) -> None:
    factor = all_over_trained_responses() if is_mean_over_responses else 1.0
    assert_same(loss_of, "trl", f"variant.{name}", options, factor)


def test_verls_name_of_the_constant_length_means_the_same() -> None:
    assert LossAggMode["seq-mean-token-sum-norm"] is cast(Any, LossAggMode)["token-sum-norm"]
