"""The recipes for large models, and their options by dotted name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import pytest

from dapo_mcore.config import RunConfig


@dataclass(frozen=True)
class Recipe:
    name: str  # of configs/experiment/<name>.yaml
    model: str  # of configs/models/<model>.json
    devices: int

    @property
    def is_for_npus(self) -> bool:
        return "_npu" in self.name


RECIPES = [
    Recipe("dapo_qwen3_vl_30b_geo3k", "Qwen3-VL-30B-A3B", 8),
    Recipe("dapo_qwen3_vl_30b_geo3k_16", "Qwen3-VL-30B-A3B", 16),
    Recipe("dapo_qwen3_vl_30b_geo3k_npu", "Qwen3-VL-30B-A3B", 16),
    Recipe("dapo_qwen3_vl_30b_geo3k_npu_tp4", "Qwen3-VL-30B-A3B", 16),
    Recipe("dapo_qwen3_30b_a3b_npu", "Qwen3-30B-A3B", 16),
    Recipe("dapo_qwen2_5_7b", "Qwen2.5-7B", 8),
]
every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)


def options(config: RunConfig) -> dict[str, Any]:
    """Dotted names -> values, enums by name."""
    return dict(leaves(asdict(config)))


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, below in tree.items():
            yield from leaves(below, f"{name}.{key}" if name else key)
    else:
        yield name, tree.name if isinstance(tree, Enum) else tree
