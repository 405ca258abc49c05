"""The in-process vLLM engine against Hugging Face models, before and after its weights are replaced."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from dapo_mcore.config import Dtype
from dapo_mcore.rollout.engine import Sampling, generate
from dapo_mcore.rollout.vllm_engine import VllmEngine
from tests.e2e.tiny_policies import (
    FAMILIES,
    RESPONSE_LENGTH,
    Letters,
    logprob_error,
    model_config,
    requests,
    rollout_config,
    save_policy,
    started,
    weights_in,
)

SAMPLING = Sampling(temperature=1.0, max_tokens=RESPONSE_LENGTH)
TOLERANCE = 2e-5  # nats, float32
WRONG = 0.05  # nats; weights that are not the model's are off by more


def versions(tmp: Path, family: str) -> tuple[list[Path], list]:
    """Four policies of a family: folders and models."""
    folders = [tmp / str(seed) for seed in range(4)]
    return folders, [save_policy(folder, family, seed) for seed, folder in enumerate(folders)]


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_the_models_when_fresh_and_after_each_of_three_updates(family: str, tmp_path: Path) -> None:
    folders, models = versions(tmp_path, family)
    wanted = requests(3, 2)
    with started(folders[0]) as engine:
        responses = generate(engine, wanted, SAMPLING)
        assert {response.version for response in responses} == {-1}
        assert logprob_error(models[0], wanted, responses) <= TOLERANCE
        for version in (1, 2, 3):
            assert logprob_error(models[version], wanted, responses) > WRONG, "the policies differ too little to tell"
            engine.load(weights_in(folders[version]), version)
            responses = generate(engine, wanted, SAMPLING)
            assert {response.version for response in responses} == {version}
            assert logprob_error(models[version], wanted, responses) <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("qwen2 tied", Dtype.fp32),
        ("qwen3_moe", Dtype.fp32),
        ("qwen3_moe", Dtype.bf16),
        ("qwen3_moe tied, odd width", Dtype.fp32),
    ],
)
def test_an_updated_engine_answers_bit_for_bit_like_a_fresh_one(family: str, dtype: Dtype, tmp_path: Path) -> None:
    folders, _ = versions(tmp_path, family)
    wanted = requests(4, 3)
    with started(folders[0], dtype) as engine:
        for version in (1, 2, 3):
            generate(engine, wanted, SAMPLING)  # fills the prefix cache
            engine.load(weights_in(folders[version]), version)
        updated = generate(engine, wanted, SAMPLING)
    with started(folders[3], dtype) as engine:
        fresh = generate(engine, wanted, SAMPLING)
    assert [r.token_ids for r in updated] == [r.token_ids for r in fresh]
    assert [r.logprobs for r in updated] == [r.logprobs for r in fresh]


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3 tied"])
def test_vllms_own_reload_alone_would_keep_packed_weights(family: str, tmp_path: Path) -> None:
    folders, models = versions(tmp_path, family)
    wanted = requests(3, 1)
    with started(folders[0]) as engine:
        engine._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights_in(folders[1])})
        assert engine._llm.reset_prefix_cache()
        assert logprob_error(models[1], wanted, generate(engine, wanted, SAMPLING)) > WRONG
        engine.load(weights_in(folders[1]), 1)
        assert logprob_error(models[1], wanted, generate(engine, wanted, SAMPLING)) <= TOLERANCE


def test_an_update_that_kept_the_prefix_cache_would_show(tmp_path: Path) -> None:
    folders, models = versions(tmp_path, "qwen3_moe")
    wanted = requests(3, 1)
    with started(folders[0]) as engine:
        generate(engine, wanted, SAMPLING)
        engine._llm.collective_rpc("update_weights_from", args=(weights_in(folders[1]),))
        assert logprob_error(models[1], wanted, generate(engine, wanted, SAMPLING)) > WRONG
        engine.load(weights_in(folders[1]), 1)
        assert logprob_error(models[1], wanted, generate(engine, wanted, SAMPLING)) <= TOLERANCE


@pytest.mark.parametrize(
    ("left_out", "named"),
    [
        ("model.layers.1.post_attention_layernorm.weight", r"did not come: model\.layers\.1\.post_attention_layernorm"),
        ("model.layers.0.self_attn.k_proj.weight", r"only in part: model\.layers\.0\.self_attn\.qkv_proj"),
        ("model.layers.1.mlp.experts.5.up_proj.weight", r"only in part: model\.layers\.1\.mlp\.experts"),
    ],
)
def test_missing_and_partial_weights_are_refused_by_name(left_out: str, named: str, tmp_path: Path) -> None:
    save_policy(tmp_path, "qwen3_moe", 0)
    weights = dict(weights_in(tmp_path))
    del weights[left_out]
    with started(tmp_path) as engine:
        with pytest.raises(ValueError, match=named):
            engine.load(weights.items(), 1)
        assert engine.version == -1


def test_a_kv_cache_below_one_sequence_is_refused_by_name(tmp_path: Path) -> None:
    save_policy(tmp_path, "qwen3", 0)  # 1 KiB of keys and values per token
    lengths = {"max_prompt_length": 1024, "max_response_length": 1024}
    with pytest.raises(ValueError, match=r"rollout\.kv_cache_mb=1: .* 2048 tokens \(data\.max_prompt_length \+ data"):
        VllmEngine(model_config(tmp_path), rollout_config(kv_cache_mb=1), Letters(), **lengths)
    forget_the_world_of_a_failed_start()


def forget_the_world_of_a_failed_start() -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


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
    with started(tmp_path) as engine:
        generate(engine, requests(2, 2), SAMPLING)
        engine.load(weights_in(tmp_path), 1)
        assert draw() == expected
