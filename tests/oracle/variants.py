"""What verl and TRL compute for the members of the algorithm family besides DAPO."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from inputs import CLIP_HIGH, CLIP_LOW, Batch, Values, draw_groups, with_gradient
from torch import Tensor

# name -> what verl is asked for; bounds are each other's reciprocal, as verl's rejection bounds 1 / rho
CORRECTIONS: dict[str, dict[str, Any]] = {
    "tis": {"rollout_is": "token", "rollout_is_threshold": 1.5},
    "icepop": {"rollout_is": "token", "rollout_is_threshold": "0.7_1.6"},
    "sequence_tis": {"rollout_is": "sequence", "rollout_is_threshold": 2.0},
    "token_k1": {"rollout_rs": "token_k1", "rollout_rs_threshold": "0.5_2.0"},
    "seq_sum_k1": {"rollout_rs": "seq_sum_k1", "rollout_rs_threshold": "0.5_2.0"},
    "seq_mean_k1": {"rollout_rs": "seq_mean_k1", "rollout_rs_threshold": "0.9375_1.0666666666666667"},
}
CISPO_HIGH = 2.0  # TRL's upper bound of the weight; it has no lower one
MAX_COMPLETION_LENGTH = 100
KL_COEF = 0.05


def rollout_logprobs(batch: Batch) -> Tensor:
    """Of an engine near the old policy: products over a response fall inside and outside of the bounds."""
    noise = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(7)).double()
    return batch.old_logprobs + 0.3 * noise


def verl_variants(batch: Batch) -> Values:
    return verl_ratios(batch) | verl_corrections(batch) | verl_baselines() | verl_kl_in_reward(batch)


def verl_ratios(batch: Batch) -> Values:
    """GSPO and CISPO, in two aggregations each."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import ActorConfig

    mask, advantages = batch.mask.double(), batch.advantages[:, None].expand_as(batch.mask)
    options = ActorConfig(
        strategy="fsdp", rollout_n=2, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=CLIP_LOW, clip_ratio_high=CLIP_HIGH
    )

    def loss_of(name: str, mode: str, logprobs: Tensor) -> Tensor:
        return get_policy_loss_fn(name)(batch.old_logprobs, logprobs, advantages, mask, mode, options)[0]

    values: Values = {}
    for name in ("gspo", "cispo"):
        for mode in ("token-mean", "seq-mean-token-mean"):
            values |= with_gradient(f"{name}.{mode}", partial(loss_of, name, mode), logprobs=batch.logprobs)
    return values


def verl_corrections(batch: Batch) -> Values:
    """The clipped loss with each correction of the mismatch."""
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask as correct
    from verl.workers.config import ActorConfig

    rollout, advantages = rollout_logprobs(batch), batch.advantages[:, None].expand_as(batch.mask)
    options = ActorConfig(
        strategy="fsdp", rollout_n=2, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=CLIP_LOW,
        clip_ratio_high=CLIP_HIGH, clip_ratio_c=10.0,
    )  # fmt: skip
    values: Values = {"input.rollout_logprobs": rollout}
    for name, asked in CORRECTIONS.items():
        weights, mask, _ = correct(batch.old_logprobs, rollout, batch.mask.double(), **asked)

        def loss_of(logprobs: Tensor, weights: Any = weights, mask: Tensor = mask) -> Tensor:
            factor = None if weights is None else weights.batch["rollout_is_weights"]
            return compute_policy_loss_vanilla(
                batch.old_logprobs, logprobs, advantages, mask, "token-mean", options, factor
            )[0]

        if weights is None:
            touched = mask < batch.mask
        else:
            free, *_ = correct(
                batch.old_logprobs, rollout, batch.mask.double(), **asked | {"rollout_is_threshold": 1e9}
            )
            touched = factors(weights) != factors(free)
        assert 0 < touched.sum() < batch.mask.sum(), f"{name} does nothing, or leaves nothing: take other bounds"
        values |= with_gradient(f"correction.{name}", loss_of, logprobs=batch.logprobs)
    return values


def factors(weights: Any) -> Tensor:
    return weights.batch["rollout_is_weights"]


def rho(batch: Batch) -> Tensor:
    return (batch.old_logprobs - rollout_logprobs(batch)).exp()


def verl_baselines() -> Values:
    """RLOO and the REINFORCE++ baseline, whose whitening counts a response once per token."""
    from verl.trainer.ppo.core_algos import (
        compute_reinforce_plus_plus_baseline_outcome_advantage,
        compute_rloo_outcome_advantage,
    )

    rewards, groups = draw_groups()
    lengths = torch.randint(1, 9, (len(rewards),), generator=torch.Generator().manual_seed(8))
    mask = (torch.arange(8) < lengths[:, None]).double()
    scores = torch.zeros_like(mask)
    scores[:, 0] = rewards
    values: Values = {"input.group.lengths": lengths}
    for name, function in (
        ("rloo", compute_rloo_outcome_advantage),
        ("reinforce_plus_plus_baseline", compute_reinforce_plus_plus_baseline_outcome_advantage),
    ):
        values[f"advantage.{name}"] = function(scores.clone(), mask, groups.numpy())[0][:, 0]
    return values


def verl_kl_in_reward(batch: Batch) -> Values:
    """Group-relative advantages of the rewards minus the k1 estimate of the KL, in groups of 4."""
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, compute_rewards

    mask, rewards = batch.mask.double(), batch.advantages
    scores = torch.zeros_like(mask)
    scores[:, 0] = rewards
    penalised = torch.where(
        batch.mask, compute_rewards(scores, batch.old_logprobs, batch.ref_logprobs, KL_COEF), scores
    )
    index = torch.arange(len(mask)) // 4
    answer, _ = compute_grpo_outcome_advantage(penalised, torch.ones_like(mask), index.numpy())
    return {"advantage.kl_in_reward": answer[:, 0]}


def trl_variants(batch: Batch, stand_in: Callable[[Batch, Tensor, float, float | None], SimpleNamespace]) -> Values:
    """GSPO, Dr.GRPO, CISPO, the mean over responses, and truncated importance sampling."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    ids = torch.ones_like(batch.mask, dtype=torch.int64)
    weights = rho(batch).clamp(max=1.5)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids,
        "completion_mask": batch.mask.double(), "advantages": batch.advantages,
        "old_per_token_logps": batch.old_logprobs, "num_items_in_batch": batch.mask.sum(),
        "importance_sampling_ratio": weights,
    }  # fmt: skip
    asked: dict[str, dict[str, Any]] = {
        "gspo": {"importance_sampling_level": "sequence", "loss_type": "grpo"},
        "grpo": {"loss_type": "grpo"},
        "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": MAX_COMPLETION_LENGTH},
        "cispo": {"loss_type": "cispo", "epsilon_high": CISPO_HIGH},
        "tis": {"use_vllm": True, "vllm_importance_sampling_correction": True},
    }
    values: Values = {"input.rollout_logprobs": rollout_logprobs(batch)}
    for name, options in asked.items():

        def loss_of(logprobs: Tensor, options: dict[str, Any] = options) -> Tensor:
            trainer = stand_in(batch, logprobs, 0.0, None)
            trainer.max_completion_length = MAX_COMPLETION_LENGTH
            vars(trainer).update(options)
            return GRPOTrainer._compute_loss(trainer, None, dict(inputs))

        values |= with_gradient(f"variant.{name}", loss_of, logprobs=batch.logprobs)
    return values
