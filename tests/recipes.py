"""The recipes for large models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    name: str  # of configs/experiment/<name>.yaml
    model: str  # of configs/models/<model>.json
    devices: int


RECIPES = [
    Recipe("dapo_qwen3_vl_30b_geo3k", "Qwen3-VL-30B-A3B", 8),
    Recipe("dapo_qwen3_vl_30b_geo3k_16", "Qwen3-VL-30B-A3B", 16),
    Recipe("dapo_qwen3_vl_30b_geo3k_npu", "Qwen3-VL-30B-A3B", 16),
    Recipe("dapo_qwen3_vl_30b_geo3k_npu_tp4", "Qwen3-VL-30B-A3B", 16),
    Recipe("dapo_qwen3_30b_a3b_npu", "Qwen3-30B-A3B", 16),
    Recipe("dapo_qwen2_5_7b", "Qwen2.5-7B", 8),
]
