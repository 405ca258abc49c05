"""Where a run is launched: platform, nodes, devices, and what of its options the environment depends on.

Standard library only.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

EXPERIMENTS = Path(__file__).resolve().parents[1] / "configs" / "experiment"
PLATFORMS = ("cpu", "cuda", "npu")
DEVICE_FILES = {"cuda": ("nvidia[0-9]*", "CUDA_VISIBLE_DEVICES"), "npu": ("davinci[0-9]*", "ASCEND_RT_VISIBLE_DEVICES")}


class Role(Enum):
    """What a process does: it trains, samples, or both (an engine inside the trainer's process)."""

    trainer = "trainer"
    rollout = "rollout"
    colocated = "colocated"


@dataclass(frozen=True, slots=True)
class Site:
    """What the environment of a run depends on."""

    platform: str  # of PLATFORMS
    nodes: int = 1
    engines_apart: bool = False  # in processes of their own: rollout.backend=ray
    graphs: bool = True  # engines capture graphs: not rollout.enforce_eager=true
    interface: str = ""  # on which the nodes see each other; "" if only the user's environment knows
    jemalloc: str = ""  # the library's file; "" where there is none

    @property
    def roles(self) -> tuple[Role, ...]:
        """Of the run's processes; first that of those which a launcher starts."""
        return (Role.trainer, Role.rollout) if self.engines_apart else (Role.colocated,)


def site_of(platform: str, nodes: int, interface: str, arguments: Sequence[str]) -> Site:
    """The site of a run with these `arguments`; `platform` may be `auto`."""
    return Site(
        platform=find_platform() if platform == "auto" else platform,
        nodes=nodes,
        engines_apart=option(arguments, "rollout.backend") == "ray",
        graphs=option(arguments, "rollout.enforce_eager").lower() != "true",
        interface=interface,
        jemalloc=find_jemalloc(),
    )


def option(arguments: Sequence[str], name: str) -> str:
    """The value of an option, from `arguments` or the experiment they name; "" if neither has it."""
    given = [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{name}=")]
    if given:
        return given[-1]
    experiments = [argument.partition("=")[2] for argument in arguments if argument.startswith("experiment=")]
    file = EXPERIMENTS / f"{experiments[-1] if experiments else ''}.yaml"
    found = re.search(rf"\b{name.rpartition('.')[2]}:\s*(\w+)", file.read_text()) if file.is_file() else None
    return found[1] if found else ""


def find_platform(environment: Mapping[str, str] = os.environ) -> str:
    """As dapo_mcore.platform decides it, without importing torch."""
    if (chosen := environment.get("DAPO_PLATFORM", "")) in PLATFORMS:  # any other is refused by the run
        return chosen
    if importlib.util.find_spec("torch_npu") is not None:
        return "npu"
    return "cuda" if any(Path("/dev").glob(DEVICE_FILES["cuda"][0])) else "cpu"


def count_devices(platform: str, environment: Mapping[str, str], root: Path = Path("/dev")) -> int | None:
    """Devices of this machine that a process may use; None on a CPU, or where there are no device files to count."""
    if platform not in DEVICE_FILES:
        return None
    pattern, visible = DEVICE_FILES[platform]
    if chosen := environment.get(visible):
        return len([name for name in chosen.split(",") if name.strip()])
    return len(list(root.glob(pattern))) or None


def find_jemalloc() -> str:
    folders = ("/usr/lib/*-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib", "/opt/conda/lib")
    found = (file for folder in folders for file in sorted(Path("/").glob(f"{folder[1:]}/libjemalloc.so*")))
    return str(next(found, ""))


def is_loopback(address: str) -> bool:
    return address == "localhost" or address.startswith("127.")


def may_use_every_core() -> bool:
    return len(os.sched_getaffinity(0)) == os.cpu_count()
