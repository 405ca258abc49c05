"""The reference model: the policy before training, whatever the policy has become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.reference import Reference, build_reference
from dapo_mcore.config import ActorConfig, Dtype, KlEstimator, MegatronConfig, ModelConfig, OptimConfig, RefConfig
from tools.certificate.reference import in_float64, random_batch, response_logprobs, tiny_model

MakeActor = Callable[..., Actor]
BATCH = random_batch(0, [(5, 20), (9, 13), (30, 3), (2, 44), (7, 7), (1, 70)], old_logprobs=False)
KL = {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": KlEstimator.k3}


def reference_of(folder: Path, family: str, dtype: Dtype = Dtype.fp32, **ref: Any) -> Reference:
    """Of the folder an actor was made from, with the packing of `make_actor`."""
    options = ActorConfig(megatron=MegatronConfig(), ppo_max_token_len_per_gpu=64)
    return build_reference(ModelConfig(path=str(folder / family), dtype=dtype), options, RefConfig(**ref))


@pytest.mark.parametrize("offload", [False, True])
def test_it_scores_the_trained_tokens_as_hugging_face_does_at_the_temperature(
    offload: bool, make_actor: MakeActor, tmp_path: Path
) -> None:
    make_actor("qwen3_moe")
    reference = reference_of(tmp_path, "qwen3_moe", param_offload=offload)
    scored = reference.score(replace(BATCH, temperature=0.7), responses_per_update=4)
    with torch.no_grad():
        exact = response_logprobs(in_float64(tiny_model("qwen3_moe")), BATCH, 0.7)
    trained = BATCH.loss_mask
    assert (scored.ref_logprobs - exact)[trained].abs().max() <= 5e-6
    assert scored.ref_logprobs[~trained].eq(0).all()


def test_its_weights_need_no_gradient_and_stay_what_they_were(make_actor: MakeActor, tmp_path: Path) -> None:
    actor = make_actor("llama", optim=OptimConfig(lr=1e-2), megatron={}, **KL)
    reference = reference_of(tmp_path, "llama")
    before = reference.score(BATCH, responses_per_update=6)
    for _ in range(2):
        actor.update(before)
    assert torch.equal(reference.score(BATCH, responses_per_update=6).ref_logprobs, before.ref_logprobs)
    assert not any(p.requires_grad for chunk in reference._chunks for p in chunk.parameters())


@pytest.mark.parametrize("dtype", [Dtype.fp32, Dtype.bf16])
def test_an_untrained_policy_is_at_a_distance_of_exactly_0_and_a_trained_one_is_not(
    dtype: Dtype, make_actor: MakeActor, tmp_path: Path
) -> None:
    actor = make_actor("qwen3", dtype=dtype, optim=OptimConfig(lr=1e-2), megatron={}, **KL)
    batch = reference_of(tmp_path, "qwen3", dtype).score(BATCH, responses_per_update=6)
    first, second = actor.update(batch), actor.update(batch)
    assert first["actor/kl_ref"].value == 0.0
    assert second["actor/kl_ref"].value > 0.0


def test_without_reference_log_probabilities_the_penalty_is_refused(make_actor: MakeActor) -> None:
    with pytest.raises(ValueError, match="ref_logprobs"):
        make_actor("llama", **KL).update(BATCH)
