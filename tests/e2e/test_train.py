"""The whole program under torchrun: it trains, resumes, and refuses bad input with one readable error."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import transformers

from tests.e2e.torchrun import VERIFIERS, errors, rows, train, train_and_kill
from tests.metrics_page import as_listed, listed
from tools.tiny.model import random_model, save_folder, tiny_config

STEPS = 4
PROBE = "weights.attest=full"
ROOT = Path(__file__).resolve().parents[2]
FAKES = ROOT / "tests" / "npu" / "fakes"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_folder(random_model(tiny_config("qwen3_moe", tied=False), seed=0), folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    result = train(model, out, f"trainer.total_training_steps={STEPS}", PROBE)
    assert result.returncode == 0, result.stderr
    return out, result


def test_a_run_leaves_metrics_events_rollouts_a_checkpoint_and_a_model(uninterrupted):
    out, result = uninterrupted
    metrics = rows(out)
    assert list(metrics) == [0, 1, 2, 3, 4]
    assert all(
        0 < metrics[step]["reward/accuracy"] < 1 and metrics[step]["actor/grad_norm"] > 0 for step in (1, 2, 3, 4)
    )
    assert all(row["weights/probe_gap"] < 1e-4 for row in metrics.values()), "nats; 5e-6 is float32's rounding"
    assert [step for step in metrics if "val/accuracy" in metrics[step]] == [0, 2, 4]
    assert (out / "checkpoints" / "latest").read_text() == "step_000004"
    assert sorted(p.name for p in (out / "checkpoints").glob("step_*")) == ["step_000003", "step_000004"]
    assert list((out / "tensorboard").glob("events*"))
    record = json.loads((out / "rollouts" / "train_000001.jsonl").read_text().splitlines()[0])
    assert record["prompt"].startswith("State the final answer")
    assert record["version"] == 0
    transformers.AutoModelForCausalLM.from_pretrained(out / "hf_model")
    steps = [line for line in result.stdout.splitlines() if line.startswith("step ")]
    assert len(steps) == STEPS + 1
    assert all(word in steps[1] for word in ("acc", "loss", "entropy", "update"))
    assert "memory in MB, calculated" in result.stdout


def test_every_metric_of_a_run_is_listed_in_the_documentation(uninterrupted):
    lines = (uninterrupted[0] / "metrics.jsonl").read_text().splitlines()
    names = {as_listed(name) for line in lines for name in json.loads(line)} - {"step"}
    assert names <= set(listed())


def test_engines_in_ray_actors_train_the_same_run(model, uninterrupted, tmp_path):
    engines = ("rollout.backend=ray", "rollout.ray.num_engines=2", PROBE)
    result = train(model, tmp_path, f"trainer.total_training_steps={STEPS}", *engines)
    assert result.returncode == 0, result.stderr
    assert rows(tmp_path) == rows(uninterrupted[0])


def test_a_run_through_the_npu_platform_is_the_same_run(model, uninterrupted, tmp_path):
    """Around the real Megatron and vLLM, fakes of torch_npu, MindSpeed and vllm-ascend with their rules."""
    path = os.pathsep.join([str(FAKES), str(ROOT), str(ROOT / "kernels")])
    result = train(model, tmp_path, f"trainer.total_training_steps={STEPS}", PROBE, PYTHONPATH=path)
    assert result.returncode == 0, result.stderr
    theirs, ours = rows(uninterrupted[0]), rows(tmp_path)
    assert ours.keys() == theirs.keys()
    for step, row in ours.items():  # the weights go another way, through vLLM's loader
        expected = {name: value for name, value in theirs[step].items() if not name.startswith("weights/")}
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6), step
        assert row["weights/probe_gap"] < 1e-4, step


def test_a_killed_and_resumed_run_has_the_metrics_of_an_uninterrupted_one(model, uninterrupted, tmp_path):
    steps = f"trainer.total_training_steps={STEPS}"
    train_and_kill(model, tmp_path, steps, PROBE, when=lambda: 3 in rows(tmp_path))
    resumed = train(model, tmp_path, steps, PROBE)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from" in resumed.stdout
    assert rows(tmp_path) == rows(uninterrupted[0])


def test_validation_alone_measures_a_checkpoint_without_training_data_and_writes_nothing_else(
    model, uninterrupted, tmp_path
):
    checkpoint = uninterrupted[0] / "checkpoints" / f"step_{STEPS:06d}"
    given = ("trainer.val_only=true", "trainer.resume_mode=resume_path", f"trainer.resume_from_path={checkpoint}")
    result = train(model, tmp_path, "trainer.total_training_steps=100", "data.train.task=''", *given)
    assert result.returncode == 0, result.stderr
    measured = {name: value for name, value in rows(uninterrupted[0])[STEPS].items() if name.startswith("val/")}
    assert rows(tmp_path) == {STEPS: {"step": STEPS, **measured}}
    assert (tmp_path / "rollouts" / f"val_{STEPS:06d}.md").exists()
    assert not (tmp_path / "checkpoints").exists()
    assert not (tmp_path / "hf_model").exists()


def test_solved_data_ends_the_run_with_the_reason_and_a_checkpoint(model, tmp_path):
    filters = "algorithm.filter_groups.max_num_gen_batches=2"
    result = train(
        model, tmp_path, "trainer.total_training_steps=2", f"reward.verifier={VERIFIERS}:always_right", filters
    )
    assert result.returncode == 0, result.stderr
    assert "stopped after step 0" in result.stdout
    assert "solved" in result.stdout
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_000000"


# what is wrong, options, what the one error names
FAULTS = {
    "a verifier that raises": ([f"reward.verifier={VERIFIERS}:broken"], "no calculator here"),
    "a verifier that hangs": ([f"reward.verifier={VERIFIERS}:hanging", "reward.timeout_s=0.5"], "reward"),
    "a verifier whose scores are too large": ([f"reward.verifier={VERIFIERS}:beyond_float32"], "must be finite"),
    "an output folder that is a file": (["trainer.output_dir=/dev/null/out"], "trainer.output_dir=/dev/null/out"),
    "a layout that does not fit": (["actor.megatron.expert_model_parallel_size=4"], "expert_model_parallel_size=4"),
    "a checkpoint that is none": (["trainer.resume_mode=resume_path", "trainer.resume_from_path=/dev"], "/dev"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_ends_with_one_error_that_names_it(model, tmp_path, fault):
    overrides, named = FAULTS[fault]
    result = train(model, tmp_path, "trainer.total_training_steps=1", *overrides)
    assert result.returncode != 0
    assert len(errors(result)) == 1, result.stderr
    assert named in result.stderr


def test_a_corrupt_weight_file_is_named(model, tmp_path):
    save_folder(random_model(tiny_config("qwen3_moe", tied=False), seed=0), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    result = train(tmp_path / "model", tmp_path / "out", "trainer.total_training_steps=1")
    assert result.returncode != 0
    assert errors(result)
    assert all("model.safetensors" in line for line in errors(result))


def test_a_row_without_an_answer_is_named(model, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "1 + 1 =", "answer": "2"}\n{"prompt": "1 + 2 ="}\n')
    options = ("data.train.task=''", f"data.train.files=[{data}]", "data.train.size=-1")
    result = train(model, tmp_path / "out", "trainer.total_training_steps=1", *options)
    assert result.returncode != 0
    assert len(errors(result)) == 1, result.stderr
    assert str(data) in result.stderr
    assert "row 2" in result.stderr
