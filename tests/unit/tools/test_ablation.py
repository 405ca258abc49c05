"""The arms of the ablation, what counts as finished, and the curves."""

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest

from dapo_mcore.train import load_config
from tools.ablation import ARMS, Run
from tools.ablation_figure import curve, draw, read_rows, spread
from tools.make_tiny_model import recipe_of
from tools.tiny.warm_start import RARE, WarmStart

STEP = {
    "overlong_filtering": {"algorithm.overlong_filtering": (False, True)},
    "clip_higher": {"actor.clip_ratio_high": (0.2, 0.28)},
    "soft_overlong": {
        "algorithm.overlong_filtering": (True, False),
        "reward.overlong_buffer.enable": (False, True),
    },
    "token_level_loss": {"actor.loss_agg_mode": ("seq-mean-token-mean", "token-mean")},
    "dynamic_sampling": {"algorithm.filter_groups.enable": (False, True)},
}


def flat(options: dict, prefix: str = "") -> dict:
    out = {}
    for name, value in options.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


def options_of(experiment: str) -> dict:
    options = flat(asdict(load_config([f"experiment={experiment}"])))
    return {name: getattr(value, "value", value) for name, value in options.items()}


@pytest.mark.parametrize(("before", "arm"), pairwise(ARMS))
def test_each_arm_differs_from_the_one_before_by_its_technique(before, arm):
    old, new = options_of(f"ablation/{before}"), options_of(f"ablation/{arm}")
    changed = {name: (old[name], new[name]) for name in new if old[name] != new[name]}
    assert changed.pop("trainer.experiment_name") == (before, arm)
    assert changed == STEP[arm]


def test_the_last_arm_is_the_quickstarts_dapo_in_smaller_mini_batches():
    dapo, quickstart = options_of(f"ablation/{ARMS[-1]}"), options_of("quickstart")
    learning = ("algorithm.", "actor.", "reward.", "rollout.n", "rollout.temperature", "data.")
    differing = {name for name in dapo if name.startswith(learning) and dapo[name] != quickstart[name]}
    assert differing == {"actor.ppo_mini_batch_size"}


def write_run(folder: Path, accuracies: list[float], groups: list[int]) -> None:
    folder.mkdir(parents=True)
    rows = [{"step": 0, "val/accuracy": accuracies[0]}]
    for step, (accuracy, sampled) in enumerate(zip(accuracies[1:], groups, strict=True), 1):
        rows.append({"step": step, "sampler/groups_submitted": sampled, "val/accuracy": accuracy, "actor/entropy": 0.1,
                     "rollout/response_length": 12.0, "rollout/pass_rate": 0.5})  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "val')


def test_a_run_is_finished_when_its_last_step_is_written(tmp_path):
    run = Run("naive_grpo", 1, tmp_path)
    assert not run.is_finished(2)
    write_run(run.folder, [0.1, 0.2, 0.3], [32, 32])
    assert run.is_finished(2)
    assert not run.is_finished(3)


def test_curves_lie_against_steps_or_against_all_groups_sampled_so_far(tmp_path):
    write_run(tmp_path / "a", [0.1, 0.3, 0.5], [40, 60])
    rows = read_rows(tmp_path / "a")
    steps, values = curve(rows, "val/accuracy", against_groups=False)
    assert (steps.tolist(), values.tolist()) == ([0, 1, 2], [0.1, 0.3, 0.5])
    assert curve(rows, "val/accuracy", against_groups=True)[0].tolist() == [0, 40, 100]
    assert curve(rows, "actor/entropy", against_groups=True)[0].tolist() == [40, 100]


def test_seeds_are_compared_where_all_of_them_have_been(tmp_path):
    write_run(tmp_path / "a", [0.0, 0.5, 1.0], [50, 50])
    write_run(tmp_path / "b", [0.0, 0.2, 0.4], [100, 100])
    places, values = spread([read_rows(tmp_path / run) for run in "ab"], "val/accuracy", against_groups=True)
    assert (places[0], places[-1]) == (0, 100)
    assert values[:, -1].tolist() == [1.0, 0.2]


def test_the_figure_is_drawn_from_whatever_arms_there_are(tmp_path):
    write_run(tmp_path / "a", [0.1, 0.3, 0.5], [40, 60])
    write_run(tmp_path / "b", [0.1, 0.2, 0.4], [32, 32])
    draw(
        {"naive_grpo": [read_rows(tmp_path / "a")], "dynamic_sampling": [read_rows(tmp_path / "b")]}, tmp_path / "f.png"
    )
    assert (tmp_path / "f.png").stat().st_size > 10_000


def test_the_rare_start_goes_on_from_the_same_warm_start_almost_without_worked_demonstrations():
    plain, rare = (recipe_of("qwen3_moe", False, 0, WarmStart(), then) for then in (None, RARE))
    assert {name: value for name, value in rare.items() if name != "then"} == plain
    assert (rare["then"]["steps"], rare["then"]["worked_only"], rare["then"]["worked_share"]) == (60, 0.0, 0.03)
