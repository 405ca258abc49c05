"""Updates through the fakes on two ranks that share every sequence, held against one process in float64."""

from __future__ import annotations

import subprocess
import sys

from tests.npu.test_contracts import ROOT, environment


def test_updates_under_context_parallelism_equal_float64() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    command = [*launcher, *meeting, "-m", "tools.certify", "--layout", "cp=2,ep=2", "--quick"]
    variables = environment() | {"GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "certificate: 2 of 2 within 2e-06" in done.stdout
