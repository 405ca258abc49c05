"""Old log-probabilities and the correction of the mismatch, through whole updates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dapo_mcore.actor import actor as actor_module
from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.loss_head import policy_loss_head
from dapo_mcore.actor.objective import Objective
from dapo_mcore.config import (
    ActorConfig,
    Dtype,
    KlEstimator,
    LossAggMode,
    LossMode,
    OldLogprobs,
    OptimConfig,
    RolloutCorrectionConfig,
    RolloutIs,
    RolloutRs,
)
from dapo_mcore.types import TrainBatch
from tests.distributed.actor_cases import gradients, relative_error
from tools.certificate.reference import random_batch, tiny_model, truth

MakeActor = Callable[..., Actor]
LENGTHS = [(5, 20), (9, 13), (30, 3), (2, 44), (7, 7), (1, 70)]
BATCH = random_batch(0, LENGTHS, old_logprobs=False)
TIS = {"rollout_correction": RolloutCorrectionConfig(rollout_is=RolloutIs.token)}
MIS = {"rollout_correction": RolloutCorrectionConfig(rollout_rs=RolloutRs.seq_sum_k1)}
GSPO = {"loss_mode": LossMode.gspo, "loss_agg_mode": LossAggMode["seq-mean-token-mean"]}


@pytest.mark.parametrize("options", [{}, TIS, {"loss_mode": LossMode.cispo}, GSPO])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_update_after_a_recompute_has_a_ratio_of_exactly_one(
    temperature: float, options: dict[str, Any], make_actor: MakeActor
) -> None:
    actor = make_actor("qwen3_moe", dtype=Dtype.bf16, old_logprobs=OldLogprobs.recompute, **options)
    for minibatch in actor.score(replace(BATCH, temperature=temperature), responses_per_update=4).split(4):
        metrics = actor.update(minibatch)
        assert metrics["actor/ratio_mean"].value == 1.0
        assert metrics["actor/kl_old"].value == 0.0


@pytest.mark.parametrize("options", [TIS, MIS])
def test_a_correction_has_the_trainers_log_probabilities_even_for_one_update(
    options: dict[str, Any], make_actor: MakeActor
) -> None:
    assert make_actor("llama").score(BATCH, responses_per_update=6).old_logprobs is None
    assert make_actor("llama").score(BATCH, responses_per_update=6, needed=True).old_logprobs is not None
    assert make_actor("llama", **options).score(BATCH, responses_per_update=6).old_logprobs is not None


def test_an_engine_that_agrees_is_corrected_by_nothing(make_actor: MakeActor) -> None:
    plain, corrected = make_actor("llama"), make_actor("llama", **TIS)
    batch = corrected.score(BATCH, responses_per_update=6)
    batch = replace(batch, rollout_logprobs=batch.old_logprobs)
    metrics = corrected.update(batch)
    assert metrics["actor/is_weight"].value == 1.0
    assert metrics["actor/mismatch_effective_sample_size"].value == 1.0
    assert metrics["actor/grad_norm"] == plain.update(batch)["actor/grad_norm"]


def test_responses_that_are_all_rejected_make_no_update(make_actor: MakeActor) -> None:
    actor = make_actor("llama", optim=OptimConfig(lr=1e-2), megatron={}, **MIS)
    batch = actor.score(BATCH, responses_per_update=6)
    batch = replace(batch, rollout_logprobs=batch.old_logprobs - 1.0)
    before = {name: weight.clone() for name, weight in actor.weights()}
    metrics = actor.update(batch)
    assert {name: ratio.value for name, ratio in metrics.items()} == {"actor/rejected_fraction": 1.0}
    assert all(torch.equal(weight, before[name]) for name, weight in actor.weights())


@pytest.mark.parametrize("old", [OldLogprobs.auto, OldLogprobs.rollout, OldLogprobs.recompute])
def test_the_gap_is_measured_against_the_trainer_wherever_the_old_log_probabilities_come_from(
    old: OldLogprobs, make_actor: MakeActor
) -> None:
    actor = make_actor("llama", old_logprobs=old)
    own = actor.logprobs(BATCH)
    metrics = actor.update(actor.score(BATCH, responses_per_update=6))
    expected = (own - BATCH.rollout_logprobs)[BATCH.loss_mask].abs()
    assert metrics["actor/mismatch_abs"].value == pytest.approx(expected.mean().item(), rel=1e-5)
    assert metrics["actor/mismatch_max"].value == pytest.approx(expected.max().item(), rel=1e-5)


def mean_over_micro_batch(batch: TrainBatch, objective: Objective) -> Any:
    """Penalty and bonus divided by the micro-batch's own tokens, the policy term by those of the batch."""
    policy = policy_loss_head(batch, objective_without(objective, entropy_coeff=0.0, kl_coeff=0.0))
    whole = policy_loss_head(batch, objective)

    def head(micro_batch: Any, given: Any) -> Any:
        right, term = whole(micro_batch, given), policy(micro_batch, given)
        share = batch.num_loss_tokens / max(len(micro_batch.tokens), 1) / 3
        return replace(right, loss=term.loss + (right.loss - term.loss) * share)

    return head


def objective_without(objective: Objective, **changes: float) -> Objective:
    return replace(objective, spec=replace(objective.spec, **changes))


def weights_dropped(batch: TrainBatch, objective: Objective) -> Any:
    return policy_loss_head(batch, replace(objective, aggregate=lambda b: (torch.ones(len(b.loss_mask)), 6)))


def ratio_of_tokens(batch: TrainBatch, objective: Objective) -> Any:
    return policy_loss_head(batch, replace(objective, ratio_of_sequence=False))


KL = {"use_kl_loss": True, "kl_loss_coef": 0.5, "kl_loss_type": KlEstimator.k3}
OFF_POLICY = replace(
    random_batch(0, LENGTHS, old_logprobs=True),
    ref_logprobs=-5.0 + torch.randn(157, generator=torch.Generator().manual_seed(1)),
)


@pytest.mark.parametrize(
    ("wrong", "options"),
    [
        (mean_over_micro_batch, KL),
        (mean_over_micro_batch, {"entropy_coeff": 0.5}),
        (weights_dropped, {"loss_agg_mode": LossAggMode["seq-mean-token-mean"]}),
        (ratio_of_tokens, GSPO),
    ],
)
def test_a_wrong_variant_of_an_option_is_seen_in_the_gradients(
    wrong: Any, options: dict[str, Any], make_actor: MakeActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = truth(tiny_model("llama"), OFF_POLICY, ActorConfig(**options)).gradients
    assert worst(make_actor("llama", **options), wanted) <= 2e-6
    monkeypatch.setattr(actor_module, "policy_loss_head", wrong)
    assert worst(make_actor("llama", **options), wanted) >= 1e-2


def worst(actor: Actor, wanted: dict[str, Tensor]) -> float:
    actor.update(OFF_POLICY)
    found = gradients(actor)
    return max(relative_error(found[name], wanted[name]) for name in wanted)
