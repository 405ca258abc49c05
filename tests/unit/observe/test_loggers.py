import json
import sys
from types import SimpleNamespace

import pytest

from dapo_mcore.config import RunConfig, TrainerConfig
from dapo_mcore.observe.loggers import console_sink, jsonl_sink, wandb_sink


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_one_json_object_per_step(tmp_path):
    write = jsonl_sink(tmp_path, first_step=0)
    write(0, {"val/accuracy": 0.25})
    write(1, {"actor/loss": float("nan"), "reward/accuracy": 0.5})
    assert rows(tmp_path) == [
        {"step": 0, "val/accuracy": 0.25},
        {"step": 1, "actor/loss": None, "reward/accuracy": 0.5},
    ]


def test_a_resumed_run_replaces_the_rows_it_writes_again(tmp_path):
    first = jsonl_sink(tmp_path, first_step=0)
    for step in range(4):
        first(step, {"x": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "x"')  # killed while writing
    jsonl_sink(tmp_path, first_step=3)(3, {"x": 2.0})
    assert [(row["step"], row["x"]) for row in rows(tmp_path)] == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0)]


@pytest.mark.parametrize(("name", "shown"), [("reward/accuracy", "acc 0.250"), ("time/rollout_s", "rollout 0.2")])
def test_the_progress_line_shows_what_the_step_has(capsys, name, shown):
    console_sink(20, ["rollout"])(3, {name: 0.25})
    line = capsys.readouterr().out
    assert line.startswith("step  3/20")
    assert shown in line
    assert "loss" not in line


@pytest.fixture
def wandb(monkeypatch):
    """Answers as wandb 0.31: a run has the id it was given, or a new one."""
    started = []

    def init(*, id=None, resume=None, **options):  # noqa: A002 - wandb's names
        assert (id is None) == (resume is None)
        started.append(id or f"new{len(started)}")
        return SimpleNamespace(id=started[-1], log=lambda row, step: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return started


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(wandb, tmp_path):
    config = RunConfig(trainer=TrainerConfig(wandb=True, output_dir=str(tmp_path)))
    for first_step in (0, 3, 5, 0):
        wandb_sink(config, {}, first_step)(first_step, {"x": 1.0})
    assert wandb == ["new0", "new0", "new0", "new3"]


def test_validation_alone_is_a_run_of_its_own_and_the_next_resumes_the_one_before(wandb, tmp_path):
    for val_only in (False, True, False):
        trainer = TrainerConfig(wandb=True, output_dir=str(tmp_path), val_only=val_only)
        wandb_sink(RunConfig(trainer=trainer), {}, first_step=3)
    assert wandb == ["new0", "new1", "new0"]


def test_a_run_resumed_in_another_folder_is_another_run_of_wandb(wandb, tmp_path):
    wandb_sink(RunConfig(trainer=TrainerConfig(wandb=True, output_dir=str(tmp_path))), {}, first_step=3)
    assert wandb == ["new0"]
