"""What a check is, and where it is made."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from launch.sites import DEVICE_FILES, PLATFORMS

ACCELERATORS = tuple(DEVICE_FILES)
Command = list[str]


@dataclass(frozen=True)
class Here:
    """A machine, and the folder in which its checks leave what they make."""

    platform: str  # of PLATFORMS
    devices: int  # processes, on a CPU
    out: Path
    given_model: Path | None = None

    @property
    def is_small(self) -> bool:
        """Sizes that two cores can do."""
        return self.platform == "cpu"

    @property
    def model(self) -> Path:
        return self.given_model or self.out / "model"

    @property
    def dtype(self) -> str:
        return "fp32" if self.is_small else "bf16"

    @property
    def pair(self) -> int:
        """Processes of a run: two where there are two devices."""
        return min(2, self.devices)

    @property
    def most(self) -> int:
        """Processes of the widest layout: the largest power of two, and at most the 8 of one machine."""
        return 1 << (min(self.devices, 8).bit_length() - 1)

    @cached_property
    def has_experts(self) -> bool:
        return self.given_model is None or "num_experts" in json.loads((self.given_model / "config.json").read_text())


@dataclass(frozen=True, slots=True)
class Check:
    """Commands, the last of which ends with its figures as a line of JSON (tools/figures.py)."""

    name: str
    proves: str  # what the documents call unverified until this has passed
    commands: Callable[[Here, Path], list[Command]]  # the folder is the check's own, and empty
    platforms: tuple[str, ...] = PLATFORMS
    least_devices: int = 1
    needs_experts: bool = False
    limit_s: float = 1800.0  # for all commands together

    def obstacle(self, here: Here) -> str:
        """Why the check cannot be made here; empty if it can."""
        if here.platform not in self.platforms:
            return f"for {' and '.join(self.platforms)}"
        if here.devices < self.least_devices:
            return f"needs {self.least_devices} devices"
        if self.needs_experts and not here.has_experts:
            return "the model has no experts"
        return ""

    def is_asked_for(self, names: list[str]) -> bool:
        """By its whole name, or by the words it begins with."""
        return not names or any(self.name == name or self.name.startswith(f"{name}-") for name in names)


def module(name: str, *arguments: object) -> Command:
    return [sys.executable, "-m", name, *map(str, arguments)]


def ranks(here: Here, count: int, name: str, *arguments: object) -> Command:
    """On `count` devices, with the environment that launches have."""
    return module("launch.torchrun", "--platform", here.platform, count, "-m", name, *arguments)
