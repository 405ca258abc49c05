"""What a machine has, found without importing any of it: a wrong torch_npu raises when it is imported, and takes torch
with it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.machinery import PathFinder
from pathlib import Path

CANN_FOLDERS = ("usr/local/Ascend/ascend-toolkit/latest", "usr/local/Ascend/cann")
CANN_VARIABLES = ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")  # of CANN's set_env.sh
CANN_FILE = "ascend_toolkit_install.info"  # in the toolkit's folder, or in that of the architecture below it


@dataclass(frozen=True)
class Machine:
    """`folders` are searched for packages, `root` for everything else."""

    folders: Sequence[str]
    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    python: tuple[int, int] = sys.version_info[:2]
    nodes: int = 1

    @cached_property
    def versions(self) -> dict[str, str]:
        """By name, in small letters with hyphens. Of two copies the one that Python would import."""
        found: dict[str, str] = {}
        for entry in importlib.metadata.distributions(path=list(self.folders)):
            name = entry.metadata["Name"]
            if name:
                found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), entry.version)
        return found

    def folder_of(self, package: str) -> Path | None:
        """Where Python would find a package."""
        spec = PathFinder.find_spec(package, list(self.folders))
        places = spec.submodule_search_locations if spec else None
        return Path(next(iter(places))) if places else None

    def has_file(self, package: str, file: str) -> bool:
        folder = self.folder_of(package)
        return folder is not None and (folder / file).exists()

    @property
    def torch_is_for_cuda(self) -> bool:
        return "+cu" in self.versions.get("torch", "") or self.has_file("torch", "lib/libtorch_cuda.so")

    @property
    def cann(self) -> str:
        """Version of the CANN toolkit; empty: none found."""
        homes = [Path(self.environment[name]) for name in CANN_VARIABLES if self.environment.get(name)]
        for home in (*homes, *(self.root / folder for folder in CANN_FOLDERS)):
            for file in (home / CANN_FILE, *sorted(home.glob(f"*-linux/{CANN_FILE}"))):
                if file.is_file() and (found := re.search(r"^version=(\S+)", file.read_text(), re.MULTILINE)):
                    return found[1]
        return ""

    @property
    def has_cann_environment(self) -> bool:
        return any(self.environment.get(name) for name in CANN_VARIABLES)

    @property
    def free_gb(self) -> float:
        return shutil.disk_usage(Path.cwd()).free / 1e9

    @property
    def interfaces(self) -> list[str]:
        return [name for _, name in socket.if_nameindex()]


def release(version: str) -> tuple[int, ...]:
    """The leading numbers: (2, 10, 0) of 2.10.0.post4+cpu, (8, 5, 0) of 8.5.0.RC1."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in found[0].split(".")) if found else ()
