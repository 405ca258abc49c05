"""Programs that train import MindSpeed before whatever must come after it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.npu.test_contracts import ROOT, environment


@pytest.mark.parametrize("program", ["tools.make_tiny_model", "tools.certify", "tools.ablation"])
def test_a_program_imports_in_an_order_that_mindspeed_accepts(program: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", f"import {program}, dapo_mcore.actor"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
