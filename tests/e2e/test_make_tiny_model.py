"""The tiny model made on the command line, its experts shared by two processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.tiny import arithmetic
from tools.tiny.arithmetic import ProblemSet

ROOT = Path(__file__).resolve().parents[2]
STEPS = 30


def make(out: Path) -> str:
    command = ["launch/torchrun.sh", "2", "-m", "tools.make_tiny_model", str(out), f"--steps={STEPS}"]
    made = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert made.returncode == 0, made.stdout + made.stderr
    return made.stdout


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}


def worked_loss(folder: Path) -> float:
    """Mean negative log-likelihood per response token of worked answers to problems of no set, by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.set_experts_implementation("eager")
    total, tokens = 0.0, 0
    for problem in ProblemSet(seed=3, size=40).draw():
        prompt, response = (tokenizer(text).input_ids for text in (problem["question"], arithmetic.worked(problem)))
        ids = torch.tensor([[*prompt, *response, tokenizer.eos_token_id]])
        with torch.no_grad():
            logprobs = model(ids[:, :-1]).logits.log_softmax(-1)
        of_response = logprobs.gather(-1, ids[:, 1:, None])[0, len(prompt) - 1 :]
        total, tokens = total - of_response.sum().item(), tokens + len(of_response)
    return total / tokens


def test_the_loss_it_reports_is_that_of_the_model_it_leaves_and_a_second_call_keeps_it(tmp_path):
    out = tmp_path / "model"
    reported = [float(loss) for loss in re.findall(rf"warm start \d+/{STEPS} loss ([\d.]+)", make(out))]
    assert len(reported) == STEPS // 10
    # The last report is of the weights one update earlier, on 64 other problems.
    assert abs(worked_loss(out) - reported[-1]) < 0.3
    assert reported[-1] < 0.6 * 3.47  # an untrained model: log 32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    made_at = (out / "model.safetensors").stat().st_mtime_ns
    assert "is there already" in make(out)
    assert (out / "model.safetensors").stat().st_mtime_ns == made_at
