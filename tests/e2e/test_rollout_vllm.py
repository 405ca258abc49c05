"""The in-process vLLM engine against Hugging Face models, before and after its weights are replaced."""

from __future__ import annotations

import gc
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from dapo_mcore.rollout.engine import Sampling
from dapo_mcore.rollout.vllm_engine import VllmEngine
from tests.e2e.tiny_policies import (
    FAMILIES,
    LENGTHS,
    RESPONSE_LENGTH,
    Letters,
    logprob_error,
    model_config,
    requests,
    rollout_config,
    save_policy,
    weights_in,
)

SAMPLING = Sampling(temperature=1.0, max_tokens=RESPONSE_LENGTH)
TOLERANCE = 2e-5  # nats, float32
WRONG = 0.05  # nats; weights that are not the model's are off by more


def start(folder: Path) -> VllmEngine:
    gc.collect()  # vLLM tears its world down when a forgotten engine is collected
    return VllmEngine(model_config(folder), rollout_config(), Letters(), **LENGTHS)


def versions(tmp: Path, family: str) -> tuple[list[Path], list]:
    """Four policies of a family: folders and models."""
    folders = [tmp / str(seed) for seed in range(4)]
    return folders, [save_policy(folder, family, seed) for seed, folder in enumerate(folders)]


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_the_models_when_fresh_and_after_each_of_three_updates(family: str, tmp_path: Path) -> None:
    folders, models = versions(tmp_path, family)
    wanted = requests(3, 2)
    engine = start(folders[0])
    responses = engine.generate(wanted, SAMPLING)
    assert {response.version for response in responses} == {-1}
    assert logprob_error(models[0], wanted, responses) <= TOLERANCE
    for version in (1, 2, 3):
        assert logprob_error(models[version], wanted, responses) > WRONG, "the policies differ too little to tell"
        engine.load(weights_in(folders[version]), version)
        responses = engine.generate(wanted, SAMPLING)
        assert {response.version for response in responses} == {version}
        assert logprob_error(models[version], wanted, responses) <= TOLERANCE


@pytest.mark.parametrize("family", ["qwen2 tied", "qwen3_moe", "qwen3_moe tied, odd width"])
def test_an_updated_engine_answers_bit_for_bit_like_a_fresh_one(family: str, tmp_path: Path) -> None:
    folders, _ = versions(tmp_path, family)
    wanted = requests(4, 3)
    engine = start(folders[0])
    for version in (1, 2, 3):
        engine.generate(wanted, SAMPLING)  # fills the prefix cache
        engine.load(weights_in(folders[version]), version)
    updated = engine.generate(wanted, SAMPLING)
    fresh = start(folders[3]).generate(wanted, SAMPLING)
    assert [r.token_ids for r in updated] == [r.token_ids for r in fresh]
    assert [r.logprobs for r in updated] == [r.logprobs for r in fresh]


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3 tied"])
def test_vllms_own_reload_alone_would_keep_packed_weights(family: str, tmp_path: Path) -> None:
    folders, models = versions(tmp_path, family)
    wanted = requests(3, 1)
    engine = start(folders[0])
    engine._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights_in(folders[1])})
    assert engine._llm.reset_prefix_cache()
    assert logprob_error(models[1], wanted, engine.generate(wanted, SAMPLING)) > WRONG
    engine.load(weights_in(folders[1]), 1)
    assert logprob_error(models[1], wanted, engine.generate(wanted, SAMPLING)) <= TOLERANCE


def test_an_update_that_kept_the_prefix_cache_would_show(tmp_path: Path) -> None:
    folders, models = versions(tmp_path, "qwen3_moe")
    wanted = requests(3, 1)
    engine = start(folders[0])
    engine.generate(wanted, SAMPLING)
    engine._llm.collective_rpc("update_weights_from", args=(weights_in(folders[1]),))
    assert logprob_error(models[1], wanted, engine.generate(wanted, SAMPLING)) > WRONG
    engine.load(weights_in(folders[1]), 1)
    assert logprob_error(models[1], wanted, engine.generate(wanted, SAMPLING)) <= TOLERANCE


def test_missing_and_partial_weights_are_refused_by_name(tmp_path: Path) -> None:
    folders, _ = versions(tmp_path, "qwen3_moe")
    engine = start(folders[0])

    def without(name: str) -> list[tuple[str, torch.Tensor]]:
        kept = [(key, tensor) for key, tensor in weights_in(folders[1]) if key != name]
        assert len(kept) == len(list(weights_in(folders[1]))) - 1
        return kept

    for left_out, named in (
        ("model.layers.1.post_attention_layernorm.weight", "model.layers.1.post_attention_layernorm.weight"),
        ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.qkv_proj"),
        ("model.layers.1.mlp.experts.5.up_proj.weight", "model.layers.1.mlp.experts"),
    ):
        with pytest.raises(ValueError, match=named):
            engine.load(without(left_out), 1)
        engine = start(folders[0])
    assert engine.version == -1


def test_a_kv_cache_below_one_sequence_is_refused_by_name(tmp_path: Path) -> None:
    save_policy(tmp_path, "qwen3", 0)  # 1 KiB of keys and values per token
    lengths = {"max_prompt_length": 1024, "max_response_length": 1024}
    with pytest.raises(ValueError, match=r"rollout\.kv_cache_mb=1: .* 2048 tokens \(data\.max_prompt_length \+ data"):
        VllmEngine(model_config(tmp_path), rollout_config(kv_cache_mb=1), Letters(), **lengths)


def test_the_trainers_random_numbers_stay_as_they_are(tmp_path: Path) -> None:
    save_policy(tmp_path, "qwen3_moe", 0)

    def seed() -> None:
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)

    def draw() -> tuple:
        return torch.rand(4).tolist(), float(np.random.rand()), random.random()

    seed()
    expected = draw()
    seed()
    engine = start(tmp_path)
    engine.generate(requests(2, 2), SAMPLING)
    engine.load(weights_in(tmp_path), 1)
    assert draw() == expected
