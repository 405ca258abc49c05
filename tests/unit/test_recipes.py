"""The recipes for large models: the values they promise, and layouts that models, engines and pushes can have."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dapo_mcore.config import RunConfig
from dapo_mcore.config_check import check
from dapo_mcore.schedules import group_size_schedule, temperature_schedule
from dapo_mcore.train import CONFIGS, load_config
from dapo_mcore.weights.families import language_config
from dapo_mcore.weights.placement import RolloutLayout, TrainLayout
from dapo_mcore.weights.plan import reshard_plan
from tests.recipes import RECIPES, every_recipe, leaves, options
from tools.plan import MODELS, read_model

# Of the published recipe for this model and these data (docs/recipes.md).
PUBLISHED = {
    "data.train_batch_size": 64, "data.gen_batch_size": 192, "rollout.n": 8, "actor.ppo_mini_batch_size": 16,
    "data.max_prompt_length": 1024, "data.max_response_length": 2048, "rollout.temperature": 1.0,
    "actor.clip_ratio_low": 0.2, "actor.clip_ratio_high": 0.28, "actor.clip_ratio_c": 10.0,
    "actor.loss_agg_mode": "token-mean", "actor.entropy_coeff": 0.0, "actor.use_kl_loss": False,
    "algorithm.filter_groups.enable": True, "algorithm.filter_groups.max_num_gen_batches": 4,
    "reward.overlong_buffer.enable": False,
    "actor.optim.lr": 1e-6, "actor.optim.lr_warmup_steps": 10, "actor.optim.weight_decay": 0.1,
    "actor.optim.clip_grad": 1.0, "actor.megatron.optimizer_offload": True, "actor.megatron.recompute": "full",
    "rollout.val.temperature": 1.0, "rollout.val.top_p": 0.7, "trainer.resume_mode": "auto",
    "trainer.val_before_train": True, "trainer.test_freq": 1, "trainer.save_freq": 20,
    "trainer.total_training_steps": 100,
}  # fmt: skip


def layout(config: RunConfig, devices: int) -> tuple[TrainLayout, RolloutLayout]:
    megatron, size = config.actor.megatron, config.rollout.tensor_model_parallel_size
    train = TrainLayout(ranks=devices, tp=megatron.tensor_model_parallel_size, cp=megatron.context_parallel_size,
                        ep=megatron.expert_model_parallel_size)  # fmt: skip
    return train, RolloutLayout(ranks=devices, tp=size, ep=size if config.rollout.enable_expert_parallel else 1)


def test_every_recipe_for_a_large_model_is_in_the_table():
    files = (CONFIGS / "experiment").glob("dapo_*.yaml")
    assert {path.stem for path in files} == {recipe.name for recipe in RECIPES}


@every_recipe
def test_a_recipe_states_only_what_differs_from_what_it_is_made_of(recipe):
    stated = yaml.safe_load((CONFIGS / "experiment" / f"{recipe.name}.yaml").read_text())
    base = [Path(entry).name for entry in stated.pop("defaults", []) if entry != "_self_"]
    plain = ["model.path=none", "trainer.total_training_steps=1"]
    before = options(load_config([f"experiment={base[0]}"] if base else plain))
    assert [name for name, value in leaves(stated) if before.get(name) == value] == []


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if "geo3k" in recipe.name], ids=lambda one: one.name)
def test_the_geometry_recipes_have_the_published_values(recipe):
    found = options(load_config([f"experiment={recipe.name}"]))
    assert {name: found[name] for name in PUBLISHED} == PUBLISHED
    assert load_config([f"experiment={recipe.name}"]).prompts_per_step == 4 * 192


@every_recipe
def test_a_recipe_passes_the_check_on_its_devices(recipe, tmp_path):
    (tmp_path / "config.json").write_text((MODELS / f"{recipe.model}.json").read_text())
    (tmp_path / "rows.parquet").touch()
    files = [f"data.{part}.files=[{tmp_path / 'rows.parquet'}]" for part in ("train", "val")]
    check(load_config([f"experiment={recipe.name}", f"model.path={tmp_path}", *files]), recipe.devices)


@every_recipe
def test_weights_of_a_recipe_s_model_have_a_way_from_its_trainer_into_its_engines(recipe):
    hf = read_model(recipe.model)
    text = language_config(hf)
    text.num_hidden_layers = 1  # one layer is like another, and so is one expert
    text.num_experts = 16
    if text is not hf:
        hf.vision_config.depth = 1
    train, engines = layout(load_config([f"experiment={recipe.name}"]), recipe.devices)
    reshard_plan(hf, train, engines)


@every_recipe
def test_the_kv_cache_holds_whole_responses_and_a_micro_batch_the_longest(recipe):
    config, text = load_config([f"experiment={recipe.name}"]), language_config(read_model(recipe.model))
    longest = config.data.max_prompt_length + config.data.max_response_length
    heads = max(1, text.num_key_value_heads // config.rollout.tensor_model_parallel_size)
    width = getattr(text, "head_dim", text.hidden_size // text.num_attention_heads)
    of_one_response = longest * text.num_hidden_layers * heads * width * 2 * 2  # key and value, two bytes each
    assert (config.rollout.kv_cache_mb << 20) % of_one_response == 0
    assert config.actor.ppo_max_token_len_per_gpu * config.actor.megatron.context_parallel_size >= longest


def test_the_7b_recipe_cools_down_and_its_groups_shrink():
    config = load_config(["experiment=dapo_qwen2_5_7b"])
    steps = (1, 50, 51, 100, 101, 200)
    assert [temperature_schedule(config)(step) for step in steps] == [1.2, 1.2, 1.1, 1.1, 1.0, 1.0]
    assert [group_size_schedule(config)(step) for step in steps] == [32, 32, 24, 24, 16, 16]
    assert config.actor.entropy_coeff == 0.001


def test_the_layouts_of_the_pod_are_those_of_the_published_recipe():
    shapes = {
        name: (m.tensor_model_parallel_size, m.context_parallel_size, m.expert_model_parallel_size)
        for name in ("dapo_qwen3_vl_30b_geo3k_npu", "dapo_qwen3_vl_30b_geo3k_npu_tp4")
        for m in [load_config([f"experiment={name}"]).actor.megatron]
    }
    assert list(shapes.values()) == [(2, 2, 8), (4, 1, 8)]
