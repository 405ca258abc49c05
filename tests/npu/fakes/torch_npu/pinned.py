"""Page-locked host memory: a build of torch for the CPU has none, beside torch_npu it has."""

from __future__ import annotations

import functools
from typing import Any

import torch
from npu_contract import require


def allow() -> None:
    empty = torch.empty

    @functools.wraps(empty)
    def pinned_or_not(*sizes: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        of_host = torch.device(options.get("device") or "cpu").type == "cpu"
        require(of_host or not pin_memory, "only memory of the host can be page-locked")
        return empty(*sizes, **options)

    torch.empty = pinned_or_not
