"""Every recipe from its launch to its last step, with a tiny model of its family (recipe_walk.py)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest

from dapo_mcore.train import load_config
from tests.e2e.recipe_walk import (
    DEGREES,
    PLACES,
    PUNISHED,
    SIZES,
    STAGED,
    Walk,
    family_of,
    overrides,
    save_family,
    walk,
)
from tests.e2e.torchrun import rows
from tests.recipes import RECIPES, Recipe, every_recipe, options

Walks = Callable[[Recipe], Walk]
OFFLOADED = ("weights", "gradients", "optimizer")


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Walks:
    """Each recipe is walked once, and a family's model and problems are made once."""

    @functools.cache
    def folder_of(family: str):
        folder = tmp_path_factory.mktemp(family)
        save_family(family, folder)
        return folder

    @functools.cache
    def walk_once(recipe: Recipe) -> Walk:
        return walk(recipe, folder_of(family_of(recipe)), tmp_path_factory.mktemp(recipe.name))

    return walk_once


def trained_rows(done: Walk) -> dict[int, dict[str, float]]:
    return {step: row for step, row in rows(done.out).items() if step}


@every_recipe
def test_only_places_and_sizes_differ_and_no_kind_of_parallelism_is_lost(recipe, tmp_path):
    before = options(load_config([f"experiment={recipe.name}"]))
    after = options(load_config(overrides(recipe, tmp_path, tmp_path)))
    follows = {"actor.loss_scale_factor"}  # data.max_response_length
    known = {*PLACES, *SIZES, *DEGREES, *PUNISHED, *STAGED, *follows}
    assert {name for name in before if before[name] != after[name]} <= known
    parallel = [name for name in before if name.endswith("_parallel_size")]
    assert [name for name in parallel if before[name] > 1] == [name for name in parallel if after[name] > 1]
    assert (
        after["data.gen_batch_size"] // after["data.train_batch_size"]
        == 3
        == before["data.gen_batch_size"] // before["data.train_batch_size"]
    )


@every_recipe
def test_a_recipe_runs_to_its_end(recipe, walked):
    done = walked(recipe)
    assert done.result.returncode == 0, done.result.stderr
    metrics = rows(done.out)
    last = max(metrics)
    assert list(metrics) == list(range(last + 1))
    assert all(math.isfinite(value) for row in metrics.values() for value in row.values())
    assert "val/accuracy" in metrics[0].keys() & metrics[last].keys()
    assert (done.out / "checkpoints" / "latest").read_text() == f"step_{last:06d}"
    assert (done.out / "hf_model" / "config.json").is_file()


@every_recipe
def test_the_engine_samples_from_the_policy_that_is_trained(recipe, walked):
    for row in trained_rows(walked(recipe)).values():
        assert row["actor/mismatch_max"] < 1e-5, "nats; 1e-6 is float32's rounding"
        assert row["actor/grad_norm"] > 0


@every_recipe
def test_the_recipes_own_options_are_at_work(recipe, walked):
    done = walked(recipe)
    for step, row in trained_rows(done).items():
        assert row["actor/lr"] == pytest.approx(1e-6 * step / 10)  # warms up over 10 steps
        assert row["rollout/groups_trained"] == 4
        assert 0 < row["rollout/pass_rate"] < 1  # the filter has dropped groups
        right, score = row["reward/accuracy"], row["reward/score"]
        assert score == pytest.approx(0.9 * right if "geo3k" in recipe.name else 2 * right - 1)


@every_recipe
def test_nothing_of_the_policy_stays_on_the_device_while_the_engine_samples(recipe, walked):
    lines = walked(recipe).result.stdout.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("memory in MB, calculated"))
    column = slice(lines[first].index("push") + len("push"), lines[first].index("sample") + len("sample"))
    stays = {line.split()[0]: line[column].strip() for line in lines[first + 1 : first + 6]}
    assert {part: stays[part] for part in OFFLOADED} == dict.fromkeys(OFFLOADED, "")


def test_temperature_and_group_size_pass_from_one_stage_to_the_next(walked):
    (recipe,) = (recipe for recipe in RECIPES if recipe.name == "dapo_qwen2_5_7b")
    stages = [(row["rollout/temperature"], row["rollout/group_size"]) for row in trained_rows(walked(recipe)).values()]
    assert stages == [(1.2, 8), (1.1, 6), (1.0, 4)]


@pytest.mark.parametrize("recipe", [one for one in RECIPES if one.is_for_npus], ids=lambda one: one.name)
def test_recipes_for_npus_go_through_the_rules_of_vllm_ascend(recipe, walked):
    assert "weights are pushed through the engine's loader: vllm-ascend" in walked(recipe).result.stdout
