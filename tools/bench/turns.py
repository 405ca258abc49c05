"""python -m tools.bench turns [--model NAME] [--repeat N]: what a turn between trainer and engine frees, and its time.

One process trains a random model and samples from it, with everything offloaded that can be. Free memory is what the
device says, all processes and captured graphs included; seconds are the fastest of N turns after one that warms up. On
a CPU engines do not sleep, and host memory is all there is.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from launch.sites import find_platform
from tools.bench.push import MODELS, build_engine, save_model
from tools.certificate.spawn import spawn
from tools.figures import Figure, as_json

KV_CACHE_MB = 128  # of tools.bench.push's engine
POLICY_BYTES = {"weights": 2, "gradients": 4, "main parameters": 4, "moments": 8}  # of a parameter, trained in bf16
FREED = 0.95  # of what can be freed, at least
LIMIT_S = 1500.0


def free_bytes() -> int:
    """On the device, all processes considered; on a CPU, of the machine."""
    from dapo_mcore.platform import platform

    platform().synchronize()
    platform().empty_cache()
    if platform().name == "cpu":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return getattr(torch, platform().name).mem_get_info()[0]


def measure(folder: Path, repeat: int) -> dict[str, float]:
    """Bytes, and seconds of the fastest turn; runs in a process of its own, as a rank of a world of one."""
    from dapo_mcore.actor import parallel
    from dapo_mcore.actor.actor import build_actor
    from dapo_mcore.config import ActorConfig, MegatronConfig, ModelConfig
    from tools.certificate.reference import random_batch

    megatron = MegatronConfig(param_offload=True, grad_offload=True, optimizer_offload=True)
    parallel.init_model_parallel(megatron, seed=0)
    actor = build_actor(ModelConfig(path=str(folder)), ActorConfig(megatron=megatron), total_steps=1)
    actor.update(random_batch(0, [(8, 8), (8, 8)], old_logprobs=True))  # the optimizer has its moments from here on
    with actor.on_host():
        engine = build_engine(folder)
        engine.sleep()
    turns = [turn(actor, engine, version) for version in range(1, repeat + 2)][1:]
    parameters = sum(parameter.numel() for chunk in actor.chunks for parameter in chunk.parameters())
    return {"parameters": parameters} | {name: min(each[name] for each in turns) for name in turns[0]}


def turn(actor: Any, engine: Any, version: int) -> dict[str, float]:
    """From training to training: the weights are pushed, the policy leaves, the engine wakes and sleeps again."""
    from dapo_mcore.platform import platform

    found: dict[str, float] = {}

    def timed(name: str, call: Callable[[], object]) -> None:
        before, start = free_bytes(), time.perf_counter()
        call()
        platform().synchronize()
        found[name] = time.perf_counter() - start
        found[f"{name}, bytes"] = free_bytes() - before

    with ExitStack() as host:
        timed("push", lambda: engine.load(actor.weights(), version))
        timed("policy leaves", lambda: host.enter_context(actor.on_host()))
        timed("engine wakes", engine.wake)
        timed("engine sleeps", engine.sleep)
        timed("policy returns", host.close)
    return found


def figures(found: dict[str, float], is_accelerator: bool) -> list[Figure]:
    policy = found["parameters"] * sum(POLICY_BYTES.values())
    engine = found["parameters"] * POLICY_BYTES["weights"] + (KV_CACHE_MB << 20)
    bar = FREED if is_accelerator else None
    shares = {"engine sleeps": engine, "policy leaves": policy}
    names = ("push", "policy leaves", "engine wakes", "engine sleeps", "policy returns")
    return [
        *(Figure(f"{name}: freed", found[f"{name}, bytes"] / 2**20, "MiB") for name in shares),
        *(Figure(f"{name}: freed, of what it held", found[f"{name}, bytes"] / size, "", bar, at_least=True)
          for name, size in shares.items()),
        *(Figure(name, found[name], "s") for name in names),
    ]  # fmt: skip


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench turns", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="moe-200M")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="end with the figures as a line of JSON")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        save_model(options.model, Path(folder))
        (found,) = spawn(measure, 1, Path(folder), options.repeat, limit_s=LIMIT_S)
    stated = figures(found, find_platform() != "cpu")
    print("\n".join(f"{figure.name}: {figure} {figure.bar_told}" for figure in stated))
    if options.json:
        print(as_json(stated))
