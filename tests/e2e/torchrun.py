"""Starts the trainer as a user does: torchrun, two processes, loopback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

LIMIT_S = 600.0
VERIFIERS = "tests.e2e.verifiers_of_tests"
# One-digit sums: short prompts. Nothing is truncated to nothing, groups of 4, two updates a step.
OPTIONS = (
    "experiment=quickstart",
    "data.train_batch_size=4",
    "data.max_response_length=16",
    "data.val.size=8",
    "rollout.n=4",
    "rollout.kv_cache_mb=32",
    "reward.overlong_buffer.len=4",
    f"reward.verifier={VERIFIERS}:even_length",
    "actor.ppo_mini_batch_size=2",
    "actor.ppo_max_token_len_per_gpu=256",
    "actor.old_logprobs=auto",
    "trainer.test_freq=2",
    "trainer.save_freq=1",
)


def command(model: Path, out: Path, *overrides: str) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    options = [*OPTIONS, f"model.path={model}", f"trainer.output_dir={out}", *overrides]
    return [*launcher, f"--master-port={port}", "-m", "dapo_mcore.train", *options]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def train(model: Path, out: Path, *overrides: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A run to its end, whatever that is, with `variables` in its environment."""
    arguments, variables = command(model, out, *overrides), environment() | variables
    return subprocess.run(arguments, capture_output=True, text=True, timeout=LIMIT_S, env=variables)


def train_and_kill(model: Path, out: Path, *overrides: str, when: Callable[[], bool]) -> None:
    """SIGKILL to every process of the run as soon as `when` holds."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(model, out, *overrides), env=environment(), **quiet)
    started = time.monotonic()
    try:
        while process.poll() is None and not when():
            if time.monotonic() - started > LIMIT_S:
                raise TimeoutError(f"the run did not come to the point where it was to be killed in {LIMIT_S} s")
            time.sleep(0.01)
        assert process.poll() is None, "the run ended before it could be killed"
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            member.kill()
        process.wait()
        psutil.wait_procs(family)


def rows(out: Path) -> dict[int, dict[str, Any]]:
    """metrics.jsonl by step, without what depends on the machine and how fast things go."""
    file = out / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    every = [json.loads(line) for line in lines]
    speed = ("time/", "sampler/", "perf/")
    return {row["step"]: {key: value for key, value in row.items() if not key.startswith(speed)} for row in every}


def errors(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("error:")]
