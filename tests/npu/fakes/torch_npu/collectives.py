"""HCCL as a backend of torch.distributed: here gloo serves what lies on the device too."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from npu_contract import require

BOTH = "cpu:gloo,npu:hccl"
ASKED: list[str] = []  # backends of worlds with NPUs


def register() -> None:
    init = dist.init_process_group

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        if backend is None or "hccl" not in backend:
            return init(backend, *args, **kwargs)
        require(backend == BOTH, f"a world with NPUs also serves tensors on the host: {BOTH}, not {backend}")
        ASKED.append(backend)
        return init("gloo", *args, **kwargs)

    dist.init_process_group = init_process_group
