"""One temperature for the engine, the old policy, the reference and the loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dapo_mcore.actor import parallel
from dapo_mcore.actor.actor import build_actor
from dapo_mcore.actor.reference import build_reference
from dapo_mcore.batch import make_batch
from dapo_mcore.config import (
    ActorConfig,
    AlgorithmConfig,
    DataConfig,
    MegatronConfig,
    OldLogprobs,
    OverlongBufferConfig,
    RefConfig,
    RewardConfig,
)
from dapo_mcore.rollout.engine import Sampling, generate
from dapo_mcore.types import Group, Sample, TrainBatch, Verdict
from tests.e2e.tiny_policies import RESPONSE_LENGTH, model_config, requests, save_policy, started

TEMPERATURE = 0.7


def sampled(folder: Path) -> TrainBatch:
    wanted = requests(4, 2)
    with started(folder) as engine:
        responses = generate(engine, wanted, Sampling(TEMPERATURE, RESPONSE_LENGTH))
    scores = [1.0, -1.0] * (len(wanted) // 2)
    samples = [Sample(r, Verdict(0.0, score)) for r, score in zip(responses, scores, strict=True)]
    groups = [Group(wanted[i].prompt, tuple(samples[i : i + 2])) for i in range(0, len(wanted), 2)]
    reward = RewardConfig(overlong_buffer=OverlongBufferConfig(enable=False))
    return make_batch(groups, AlgorithmConfig(), reward, DataConfig(max_response_length=RESPONSE_LENGTH))


def test_engine_policy_and_reference_agree_at_the_temperature_of_the_rollout(tmp_path: Path) -> None:
    save_policy(tmp_path, "qwen3_moe", 0)
    batch = replace(sampled(tmp_path), temperature=TEMPERATURE)
    options = ActorConfig(megatron=MegatronConfig(), old_logprobs=OldLogprobs.recompute, use_kl_loss=True,
                          kl_loss_coef=0.1)  # fmt: skip
    parallel.init_process_group()
    parallel.init_model_parallel(MegatronConfig(), seed=0)
    try:
        policy = build_actor(model_config(tmp_path), options, total_steps=1)
        reference = build_reference(model_config(tmp_path), options, RefConfig())
        scored = reference.score(policy.score(batch, len(batch)), len(batch))
        other = policy.score(replace(batch, temperature=1.0), len(batch))
        metrics = {name: ratio.value for name, ratio in policy.update(scored).items()}
    finally:
        parallel.destroy_model_parallel()
        dist.destroy_process_group()
    assert (scored.old_logprobs - batch.rollout_logprobs).abs().max() <= 2e-5
    assert torch.equal(scored.old_logprobs, scored.ref_logprobs)
    assert (other.old_logprobs - batch.rollout_logprobs).abs().max() >= 1e-2
    assert metrics["actor/ratio_mean"] == 1.0
    assert metrics["actor/kl_ref"] == 0.0
    assert metrics["actor/mismatch_max"] <= 2e-5
    assert metrics["actor/mismatch_effective_sample_size"] == pytest.approx(1.0, abs=1e-6)
