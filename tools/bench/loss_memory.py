"""Peak memory of one contender on CPU, in a process of its own: python -m tools.bench.loss_memory NAME T H V.

Prints bytes above what the inputs and the returned gradients take. Peak resident size is reset through Linux's
clear_refs after the inputs exist; freed blocks go back to the system at once because the caller sets
MALLOC_MMAP_THRESHOLD_, so nothing of the set-up is counted or hides anything.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from tools.bench.loss_contenders import Shape, eager, make_problem, ours, ours_logprobs

MEASURED = {"eager": eager, "ours": ours, "ours_logprobs": ours_logprobs}


def resident_bytes(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def peak_of(name: str, shape: Shape) -> int:
    """Runs a child process; bytes."""
    command = [sys.executable, "-m", "tools.bench.loss_memory", name]
    sizes = [str(size) for size in (shape.tokens, shape.hidden_size, shape.vocabulary)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return int(subprocess.run([*command, *sizes], env=environment, check=True, capture_output=True, text=True).stdout)


def main(name: str, tokens: int, hidden_size: int, vocabulary: int) -> None:
    torch.set_num_threads(2)
    MEASURED[name](
        make_problem(Shape(64, hidden_size, 512, torch.float32, torch.device("cpu")))
    )  # loads code and thread pools
    problem = make_problem(Shape(tokens, hidden_size, vocabulary, torch.float32, torch.device("cpu")))
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    MEASURED[name](problem)
    gradients = sum(x.grad.nbytes for x in (problem.hidden, problem.weight) if x.grad is not None)
    print(resident_bytes("VmHWM") - before - gradients)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
