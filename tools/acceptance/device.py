"""python -m tools.acceptance.device: one JSON line about the accelerator of this machine, as its driver calls it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import torch

from dapo_mcore.platform import platform


def device_name(name: str) -> str:
    """Of a platform's first device."""
    if name == "cpu":
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return f"{found[1] if found else 'CPU'}, {os.cpu_count()} cores"
    return str(getattr(torch, name).get_device_name(0))


if __name__ == "__main__":
    here = platform()
    print(json.dumps({"device": device_name(here.name), "memory_gb": here.memory_stats().total / 1e9}))
