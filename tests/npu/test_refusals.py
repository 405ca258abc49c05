"""Machines and launches that cannot train on an NPU, as users start them: one error of one rank, before any model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.e2e.torchrun import errors
from tools.tiny.model import random_model, save_folder, tiny_config

ROOT = Path(__file__).resolve().parents[2]
FAKES = ROOT / "tests" / "npu" / "fakes"
LAUNCHER = str(ROOT / "launch" / "torchrun.sh")
TRAIN = ("-m", "dapo_mcore.train", "experiment=quickstart")
ALONE = (sys.executable, *TRAIN, "actor.megatron.expert_model_parallel_size=1")
ON_TWO = (LAUNCHER, "2", *TRAIN)
OF_A_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DAPO_PLATFORM", "ASCEND_RT_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME")
# torch loads what asks for it when it is imported, and ends where that cannot be loaded
LOADED_BY_TORCH = {"torch_npu-2.13.0.dist-info/entry_points.txt": "[torch.backends]\ntorch_npu = torch_npu\n"}
TORCH_FOR_CUDA = """
import sys
from importlib.machinery import PathFinder

class Finder:
    @staticmethod
    def find_spec(name, path, target=None):
        if name != "torch.version":
            return None
        spec = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), setattr(module, "cuda", "12.8"))
        return spec

sys.meta_path.insert(0, Finder)
"""


def metadata(**versions: str) -> dict[str, str]:
    """Packages as pip notes them: file -> text."""
    return {f"{name}-{version}.dist-info/METADATA": f"Name: {name}\nVersion: {version}\n"
            for name, version in versions.items()}  # fmt: skip


@dataclass(frozen=True)
class Refusal:
    says: str  # a pattern: cause and cure
    files: dict[str, str] = field(default_factory=dict)  # found before the fakes
    variables: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ALONE


REFUSALS = {
    "no CANN": Refusal(
        r"torch_npu cannot be imported \(libhccl\.so.*source CANN's set_env\.sh",
        metadata(torch_npu="2.13.0") | LOADED_BY_TORCH, {"FAKE_TORCH_NPU": "no_cann"}, ON_TWO),
    "a torch for CUDA": Refusal(
        r"torch .* is a build for CUDA, and torch_npu.*install the CPU build", {"sitecustomize.py": TORCH_FOR_CUDA}),
    "torch_npu for another torch": Refusal(
        r"torch 2\.13\.0\+cpu beside torch-npu 2\.10\.0\.post4: .*install the CPU build of torch==2\.10\.0",
        metadata(torch_npu="2.10.0.post4"), command=ON_TWO),
    "vllm-ascend for another vLLM": Refusal(
        r"vllm 0\.23\.0\+empty beside vllm-ascend 0\.26\.0: .*install vllm-ascend==0\.23\.0",
        metadata(vllm="0.23.0+empty", vllm_ascend="0.26.0")),
    "a Megatron-Core that MindSpeed is not made for": Refusal(
        r"megatron-core 0\.19\.2: MindSpeed.*install megatron-core==0\.16\.1", metadata(megatron_core="0.19.2")),
    "a later MindSpeed": Refusal(
        r"MindSpeed at .* has no megatron_adaptor\.py: .*core_r0\.16\.0", {"mindspeed/__init__.py": ""}),
    "fewer devices than processes": Refusal(
        r"PROCESSES=2: this machine has 1 visible npu devices.*use that many, on every node",
        variables={"ASCEND_RT_VISIBLE_DEVICES": "0"}, command=ON_TWO),
    "no interface on two nodes": Refusal(
        r"GLOO_SOCKET_IFNAME: is not set, and 2 nodes.*--interface",
        command=(LAUNCHER, "--nodes=2", "--node-rank=0", "--master-addr=127.0.0.1", "2", *TRAIN)),
    "a rank of another launch": Refusal(
        r"RANK=1: WORLD_SIZE is not set, so it is left over.*unset RANK", variables={"RANK": "1"}),
    "a device of another launch": Refusal(
        r"LOCAL_RANK=3: RANK is not set, so it is left over.*unset LOCAL_RANK", variables={"LOCAL_RANK": "3"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_folder(random_model(tiny_config("qwen3_moe", tied=False), seed=0), folder)
    return folder


def machine(folder: Path, refusal: Refusal) -> dict[str, str]:
    """The environment of a process that finds the fakes, and before them what is different."""
    for name, text in refusal.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    path = os.pathsep.join(map(str, (folder, FAKES, ROOT, ROOT / "kernels")))
    kept = {name: value for name, value in os.environ.items() if name not in OF_A_LAUNCH}
    return {**kept, "PYTHONPATH": path, "PYTHON": sys.executable, **refusal.variables}


@pytest.mark.parametrize("name", REFUSALS)
def test_one_rank_names_cause_and_cure_before_anything_is_built(name: str, model: Path, tmp_path: Path) -> None:
    refusal, out = REFUSALS[name], tmp_path / "out"
    command = [*refusal.command, f"model.path={model}", f"trainer.output_dir={out}"]
    done = subprocess.run(command, cwd=ROOT, env=machine(tmp_path / "packages", refusal), capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert done.returncode != 0
    assert len(errors(done)) == 1, done.stderr
    assert re.search(refusal.says, errors(done)[0]), done.stderr
    assert "Traceback" not in done.stderr
    assert "memory in MB" not in done.stdout
    assert not out.exists()
