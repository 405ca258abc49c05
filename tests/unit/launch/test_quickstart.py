"""The quickstart: which run it starts, what it keeps, what it reports."""

import json
from importlib import import_module

import pytest

from dapo_mcore.train import load_config
from launch.progress import StageFailed
from launch.quickstart import (
    Folders,
    describe,
    make_model,
    move_finished_run,
    read_metrics,
    report,
    training_arguments,
)
from launch.recipes import PICTURES, RECIPES, TEXT
from tools.make_tiny_model import recipe_of

ROWS = [
    {"step": 0, "val/accuracy": 0.25, "val/accuracy_greedy": 0.125},
    {"step": 1, "reward/accuracy": 0.3, "actor/loss": 0.01},
    {"step": 2, "reward/accuracy": 0.62, "val/accuracy": 0.75, "val/accuracy_greedy": 0.875},
]


@pytest.fixture
def folders(tmp_path):
    made = Folders(tmp_path / "outputs" / "quickstart")
    made.model.mkdir(parents=True)
    return made


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.quickstart.ROOT", tmp_path)


def write(folders, rows, end=""):
    folders.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)


def test_recipes_and_seeds_have_folders_of_their_own():
    assert Folders.of(TEXT, 0).run.name == "quickstart"
    assert Folders.of(TEXT, 1).run.name == "quickstart-seed1"
    assert Folders.of(PICTURES, 1).run.name == "quickstart_vl-seed1"


def test_the_training_command_is_a_valid_run_on_the_problems_of_its_seed(folders):
    (folders.model / "recipe.json").write_text(json.dumps(recipe_of("qwen3_moe", False, 2, None)))
    module, name, *overrides = training_arguments(TEXT, folders, 2)
    assert (module, name) == ("-m", "dapo_mcore.train")
    config = load_config(overrides)
    assert config.model.path == str(folders.model)
    assert config.trainer.output_dir == str(folders.run)
    assert config.trainer.seed == 2
    assert config.data.train.seed == 22_000_000
    assert config.data.val.seed == 10_000_000


def test_with_pictures_the_run_reads_the_files_that_were_made_with_the_model(folders):
    config = load_config(training_arguments(PICTURES, folders, 2)[2:])
    assert config.model.path == str(folders.model)
    assert config.trainer.output_dir == str(folders.run)
    assert config.trainer.seed == 2
    assert [config.data.train.files, config.data.val.files] == [
        [str(folders.model / name)] for name in ("train.parquet", "val.parquet")
    ]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_number_of_steps_is_that_of_the_experiment(recipe):
    assert recipe.total_steps() == load_config([f"experiment={recipe.name}"]).trainer.total_training_steps


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_recipe_names_a_module_that_makes_its_model(recipe):
    assert callable(import_module(recipe.maker).main)


def test_a_row_that_is_still_being_written_is_not_read(folders):
    write(folders, ROWS[:2], end='{"step": 2, "rew')
    assert list(read_metrics(folders.metrics)) == ROWS[:2]


def test_a_run_without_metrics_has_no_rows(folders):
    assert list(read_metrics(folders.metrics)) == []


def test_progress_names_step_training_accuracy_and_every_validation():
    assert describe(ROWS, 20) == "step 2 of 20, training accuracy 62%, validation 25% → 75%"
    assert describe(ROWS[:1], 20) == "step 0 of 20, validation 25%"


def test_an_interrupted_run_is_left_in_place_to_be_continued(folders):
    write(folders, ROWS)
    move_finished_run(folders)
    assert list(read_metrics(folders.metrics)) == ROWS


def test_a_finished_run_is_kept_under_the_next_free_number_and_the_model_is_used_again(folders):
    folders.run.with_name("quickstart.1").mkdir()
    (folders.model / "config.json").write_text("{}")
    folders.exported.mkdir()
    write(folders, ROWS)
    move_finished_run(folders)
    assert list(read_metrics(folders.run.with_name("quickstart.2") / "metrics.jsonl")) == ROWS
    assert [path.name for path in folders.run.iterdir()] == ["model"]
    assert (folders.model / "config.json").exists()


def test_the_report_compares_the_first_validation_with_the_last(folders, capsys):
    write(folders, ROWS)
    report(folders)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["before", "25.0%", "12.5%"] in lines
    assert ["after", "2", "steps", "75.0%", "87.5%"] in lines


def test_a_run_without_a_second_validation_is_a_failure_that_names_the_log(folders):
    write(folders, ROWS[:2])
    with pytest.raises(StageFailed, match=r"too few validations .*train\.log"):
        report(folders)


def test_a_model_of_the_same_seed_and_code_is_not_made_again(folders, monkeypatch, capsys):
    monkeypatch.setattr("launch.quickstart.launch", lambda *arguments, **callbacks: pytest.fail("it was made again"))
    (folders.model / "made_by.sha256").write_text(TEXT.fingerprint(4))
    make_model(TEXT, folders, seed=4)
    assert "is up to date" in capsys.readouterr().out


@pytest.mark.parametrize(("recipe", "processes"), [(TEXT, 2), (PICTURES, 1)])
def test_a_model_of_another_seed_is_made_anew_and_marked(folders, monkeypatch, recipe, processes):
    made = []
    monkeypatch.setattr("launch.quickstart.launch", lambda *arguments, **callbacks: made.append(arguments[:2]))
    (folders.model / "made_by.sha256").write_text(recipe.fingerprint(4))
    make_model(recipe, folders, seed=5)
    assert made == [(processes, ["-m", recipe.maker, str(folders.model), "--seed=5"])]
    assert (folders.model / "made_by.sha256").read_text() == recipe.fingerprint(5) != recipe.fingerprint(4)
