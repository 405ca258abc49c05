"""What the quickstarts differ in. Standard library only, as all that runs before the installation."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.install import ROOT

TOOLS = ROOT / "tools"


@dataclass(frozen=True)
class Recipe:
    """A policy, and the experiment that trains it."""

    name: str  # of configs/experiment/<name>.yaml and of the folder of a run
    maker: str  # module that makes the model folder
    processes: int  # of the maker
    policy: str  # in words
    problems: Callable[[Path], Mapping[str, Any]]  # model folder -> options that name what the warm start left out

    @property
    def experiment(self) -> Path:
        return ROOT / "configs" / "experiment" / f"{self.name}.yaml"

    def total_steps(self) -> int:
        found = re.search(r"^\s*total_training_steps:\s*(\d+)", self.experiment.read_text(), re.MULTILINE)
        if found is None:
            raise ValueError(f"{self.experiment}: has no total_training_steps; add it below trainer")
        return int(found[1])

    def fingerprint(self, seed: int) -> str:
        """Changes with the seed and with the code that makes the model."""
        digest = hashlib.sha256(str(seed).encode())
        for path in (TOOLS / f"{self.maker.removeprefix('tools.')}.py", *sorted((TOOLS / "tiny").glob("*.py"))):
            digest.update(path.read_bytes())
        return digest.hexdigest()


def drawn_by_seed(model: Path) -> dict[str, Any]:
    problems = json.loads((model / "recipe.json").read_text())["problems"]
    return {"data.train.seed": problems["train"]["seed"]}


def beside_the_model(model: Path) -> dict[str, Any]:
    return {"data.train.files": f"[{model / 'train.parquet'}]", "data.val.files": f"[{model / 'val.parquet'}]"}


TEXT = Recipe(
    name="quickstart",
    maker="tools.make_tiny_model",
    processes=2,
    policy="a Qwen3-MoE with 251,328 parameters that can show its work and seldom does",
    problems=drawn_by_seed,
)
PICTURES = Recipe(
    name="quickstart_vl",
    maker="tools.make_perimeter_model",
    processes=1,
    policy="a Qwen3-VL-MoE with 796,608 parameters that can read lengths in pictures and seldom adds them up",
    problems=beside_the_model,
)
RECIPES = {recipe.name: recipe for recipe in (TEXT, PICTURES)}
