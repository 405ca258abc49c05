"""The estimated cost of an image against what torch counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3VLMoeConfig

from dapo_mcore.actor.vision.cost import image_cost
from dapo_mcore.actor.vision.tower import build_tower, visual_features
from dapo_mcore.config import TowerTraining, VisionConfig
from dapo_mcore.types import VisualSpan
from tests.tiny_vl import tiny_vl


def layout(tp: int = 1, cp: int = 1) -> Any:
    return SimpleNamespace(tensor_model_parallel_size=tp, context_parallel_size=cp)


ALL = VisionConfig(train=TowerTraining.all)


@pytest.mark.parametrize(("rows", "columns"), [(2, 4), (5, 5)])
def test_it_is_what_torch_counts_of_a_forward(rows: int, columns: int) -> None:
    hf: Any = tiny_vl("qwen3_vl").config
    tower = build_tower(hf.vision_config, torch.float32, TowerTraining.frozen, recomputes=False)
    tower.set_attn_implementation("eager")  # of fused attention on a CPU nothing is counted
    with FlopCounterMode(display=False) as counted:
        visual_features(tower, [torch.zeros(rows * columns * 4, 96)], torch.tensor([[rows, columns]]))
    span = VisualSpan(0, rows, columns)
    assert image_cost(hf, layout(), ALL)(span) == pytest.approx(counted.get_total_flops(), rel=1e-6)


def test_the_published_tower_takes_4_gflop_for_a_token_of_an_image_of_336() -> None:
    cost = image_cost(Qwen3VLMoeConfig(vision_config={"out_hidden_size": 2048}), layout(), ALL)
    assert cost(VisualSpan(0, 14, 24)) / 336 == pytest.approx(4.2e9, rel=0.01)


def test_what_every_rank_computes_counts_for_each_and_what_they_split_once() -> None:
    hf, span = Qwen3VLMoeConfig(), VisualSpan(0, 4, 4)
    once = image_cost(hf, layout(), ALL)(span)
    assert image_cost(hf, layout(tp=2, cp=3), ALL)(span) == 6 * once
    assert image_cost(hf, layout(tp=2, cp=3), VisionConfig(train=TowerTraining.all, split_images=True))(span) == once


def test_a_frozen_tower_is_free_and_mergers_alone_cost_less_than_half() -> None:
    hf, span = Qwen3VLMoeConfig(), VisualSpan(0, 4, 4)
    whole = image_cost(hf, layout(), ALL)(span)
    assert image_cost(hf, layout(), VisionConfig())(span) == 0
    assert whole / 3 < image_cost(hf, layout(), VisionConfig(train=TowerTraining.mergers))(span) < whole / 2
