"""Runs a function on several gloo ranks and hands back what each returned."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def spawn(function: Callable[..., Any], world_size: int, *args: Any, limit_s: float = 600.0) -> list[Any]:
    """[rank] -> function(*args) on a rank of a process group of `world_size`.

    Ranks are forked from a server process, with what `multiprocessing.set_forkserver_preload` made it import.
    `function` must be importable by name. An exception on any rank is raised here; ranks that hang are killed after
    `limit_s` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, folder, function, args)
        context = mp.start_processes(_run, arguments, world_size, join=False, start_method="forkserver")
        assert context is not None  # only with join
        deadline = time.monotonic() + limit_s
        try:
            while not context.join(timeout=5.0):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__}: ranks still run after {limit_s} s")
        finally:
            for process in filter(None, context.processes):
                process.kill()
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _run(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    from dapo_mcore.actor.parallel import Rendezvous, init_process_group

    os.environ.update(ENVIRONMENT)
    torch.set_num_threads(1)
    init_process_group(Rendezvous(f"file://{folder}/rendezvous", rank, world_size), timeout_s=300.0)
    torch.save(function(*args), Path(folder) / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
