"""Between sampling and the first update: old policy, reference, reward and advantage, in that order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.reference import build_reference
from dapo_mcore.assemble import scoring
from dapo_mcore.config import (
    ActorConfig,
    AlgorithmConfig,
    Dtype,
    KlCtrlConfig,
    MegatronConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)
from tools.certificate.reference import random_batch

MakeActor = Callable[..., Actor]
LENGTHS = [(5, 20), (9, 13), (30, 3), (2, 44)]
BATCH = replace(
    random_batch(0, LENGTHS, old_logprobs=False),
    rewards=torch.tensor([1.0, -1.0, 1.0, -1.0]), groups=torch.tensor([0, 0, 1, 1]),
)  # fmt: skip


def test_the_kl_enters_the_advantages_of_a_policy_that_has_moved(make_actor: MakeActor, tmp_path: Path) -> None:
    actor = make_actor("llama", optim=OptimConfig(lr=1e-2), megatron={})
    model = ModelConfig(path=str(tmp_path / "llama"), dtype=Dtype.fp32)
    algorithm = AlgorithmConfig(use_kl_in_reward=True, kl_ctrl=KlCtrlConfig(kl_coef=0.1), norm_adv_by_std_in_grpo=False)
    config = RunConfig(model=model, algorithm=algorithm)
    options = ActorConfig(megatron=MegatronConfig(), ppo_max_token_len_per_gpu=64)
    score = scoring(config, actor, build_reference(model, options, config.ref))
    before = score(BATCH, 4)
    assert torch.equal(before.old_logprobs, before.ref_logprobs)
    assert torch.equal(before.rewards, BATCH.rewards)
    actor.update(before)
    after = score(BATCH, 4)
    kl = BATCH.sum_by_response((after.old_logprobs - after.ref_logprobs).double() * BATCH.loss_mask)
    assert kl.abs().max() > 0.1
    rewards = BATCH.rewards - 0.1 * kl
    means = torch.stack([rewards[:2].mean(), rewards[2:].mean()])[BATCH.groups]
    expected = (rewards - means)[BATCH.responses]
    torch.testing.assert_close(after.advantages.double(), expected, rtol=1e-4, atol=1e-5)


def test_without_options_that_need_them_nothing_is_scored(make_actor: MakeActor) -> None:
    assert scoring(RunConfig(), make_actor("llama"), None)(BATCH, 4) is BATCH
