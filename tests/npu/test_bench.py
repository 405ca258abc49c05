"""The bench of the policy loss on the NPU platform, over the fakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from tests.npu.test_contracts import ROOT, environment
from tools.figures import read_figures


def test_the_loss_is_measured_by_the_fused_cross_entropy_too(tmp_path: Path) -> None:
    """Against float64 on the host, of fewer tokens than there are."""
    command = [sys.executable, "-m", "tools.bench", "loss", "--device", "npu", "--repeats", "1", "--json"]
    shape = ["--shape", "1030", "32", "97"]
    done = subprocess.run([*command, *shape], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    log = tmp_path / "log.txt"
    log.write_text(done.stdout)
    found = {figure.name: figure.value for figure in read_figures(log)}
    for name in ("ours", "ours, backend npu"):
        assert found[name] > 0
        assert f"{name}: extra memory" in found
        assert 0 < found[f"{name}: gradient error"] < torch.finfo(torch.bfloat16).eps
    assert "triton" in done.stdout.partition("not measured:")[2]
