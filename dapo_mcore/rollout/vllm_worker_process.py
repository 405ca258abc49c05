"""What the worker processes of an engine that has such begin with: they import this module for its `WeightUpdate`."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal

from vllm.platforms import current_platform

from dapo_mcore.rollout import vllm_cpu
from dapo_mcore.rollout.vllm_worker import WeightUpdate

__all__ = ["WeightUpdate"]

PR_SET_PDEATHSIG = 1  # of Linux, prctl(2): the signal to get when the parent ends


def _end_with_parent() -> None:
    """vLLM's workers notice that the engine's process has gone between two calls; one that waits for another worker
    inside a collective never would. The kernel ends this process whatever it does.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent.pid:
        raise RuntimeError("the process of the rollout engine ended while this worker was starting")


_end_with_parent()
if current_platform.is_cpu():
    vllm_cpu.send_experts_to_their_owners()
    vllm_cpu.unname_shared_memory()
