"""Whole runs in which torch_npu and MindSpeed stand beside vLLM, data, reward workers and checkpoint writers.

Around vLLM's CPU engine are the rules of vllm-ascend, by the fakes. Asked for as test_real.py is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.e2e import test_train_vision, torchrun
from tests.npu.real import test_real
from tests.npu.real.test_real import FOLDER, ROOT
from tools.tiny.model import random_model, save_folder, tiny_config

pytestmark = test_real.pytestmark
STEPS = 3
OPTIONS = (f"trainer.total_training_steps={STEPS}", f"trainer.max_ckpt_to_keep={STEPS}", "weights.attest=full")
# The weights go another way, through vLLM's loader, and after every sleep: the probes are more.
OF_PUSH = ("weights/", "moe/replay_changed_fraction")
FAMILIES = ("qwen3_moe", "qwen3_vl_moe")
REAL, OURS = "tests.npu.real.train", "dapo_mcore.train"


@dataclass(frozen=True)
class Runs:
    """The same run twice."""

    model: Path
    options: list[str]
    on_cpu: Path  # by the CPU platform
    real: Path


def started(module: str, options: list[str], out: Path) -> Path:
    """To its end, on two ranks that share the experts, as a user starts it; answers its output folder."""
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    chosen = test_real.environment(f"{FOLDER}/lib") if module == REAL else path
    variables = torchrun.environment() | chosen | {"PYTHON": sys.executable}
    launcher = [str(ROOT / "launch" / "torchrun.sh"), "2", "-m", module]
    command = [*launcher, *torchrun.OPTIONS, *OPTIONS, *options, f"trainer.output_dir={out}"]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=2 * torchrun.LIMIT_S)
    assert result.returncode == 0, result.stderr[-4000:]
    through_loader = "weights are pushed through the engine's loader: vllm-ascend"
    assert (through_loader in result.stdout) == (module == REAL)
    return out


def pictures(folder: Path) -> list[str]:
    write = test_train_vision.write_rows
    sources = {"train": write(folder / "train.jsonl", 30), "val": write(folder / "val.jsonl", 6)}
    return [*test_train_vision.OPTIONS, *(f"data.{name}.files=[{file}]" for name, file in sources.items())]


@pytest.fixture(scope="module", params=FAMILIES)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder: Path = tmp_path_factory.mktemp(request.param)
    save_folder(random_model(tiny_config(request.param), seed=0), folder / "model")
    seen = pictures(folder) if "vl" in request.param else []
    options = [*seen, f"model.path={folder / 'model'}"]
    return Runs(
        folder / "model", options, started(OURS, options, folder / "cpu"), started(REAL, options, folder / "real")
    )


def test_a_run_is_that_of_the_cpu_platform(runs: Runs) -> None:
    expected, found = torchrun.rows(runs.on_cpu), torchrun.rows(runs.real)
    assert found.keys() == expected.keys() == set(range(STEPS + 1))
    for step, row in found.items():
        same = {name: value for name, value in expected[step].items() if not name.startswith(OF_PUSH)}
        assert {name: row[name] for name in same} == pytest.approx(same, rel=1e-5, abs=1e-6), step
        assert row["weights/probe_gap"] < 2e-5, "nats"


def test_the_exported_policy_is_that_of_the_cpu_platform(runs: Runs) -> None:
    folders = (runs.model, runs.on_cpu / "hf_model", runs.real / "hf_model")
    before, expected, found = (load_file(folder / "model.safetensors") for folder in folders)
    assert found.keys() == expected.keys() == before.keys()
    for name, weight in found.items():
        moved = (expected[name] - before[name]).norm()
        assert (weight - expected[name]).norm() <= 1e-4 * moved, name


def test_a_resumed_run_has_the_metrics_of_the_uninterrupted_one(runs: Runs, tmp_path: Path) -> None:
    first = runs.real / "checkpoints" / "step_000001"
    resume = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={first}"]
    resumed = torchrun.rows(started(REAL, [*runs.options, *resume], tmp_path))
    assert resumed == {step: row for step, row in torchrun.rows(runs.real).items() if step > 1}
