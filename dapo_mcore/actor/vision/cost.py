"""What the images of a sequence cost beside its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.transformer import TransformerConfig

from dapo_mcore.config import TowerTraining, VisionConfig
from dapo_mcore.types import VisualSpan


def image_cost(hf: Any, config: TransformerConfig, vision: VisionConfig) -> Callable[[VisualSpan], float]:
    """FLOPs of an image's way through the vision tower, to be added to those of `balance.sequence_cost`.

    A frozen tower sees an image once for many responses: 0. Where only the mergers are trained the blocks have no
    backward pass, which is two thirds of the work. The decoder's work is shared by tensor and context parallel ranks;
    the tower's is done by each, unless they split the images.
    """
    if not hasattr(hf, "vision_config") or vision.train is TowerTraining.frozen:
        return lambda span: 0.0
    tower = hf.vision_config
    width, merge = tower.hidden_size, tower.spatial_merge_size**2
    block = 4 * width**2 + 2 * width * tower.intermediate_size
    patch = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2 * width
    merger = (merge * width) ** 2 + merge * width * tower.out_hidden_size
    mergers = (1 + len(tower.deepstack_visual_indexes)) * merger
    trained = 1.0 if vision.train is TowerTraining.all else 1 / 3
    copies = 1 if vision.split_images else config.tensor_model_parallel_size * config.context_parallel_size

    def cost(span: VisualSpan) -> float:
        patches = span.num_tokens * merge
        blocks = 2.0 * patches * (patch + tower.depth * block) + 4.0 * tower.depth * width * patches**2
        return copies * (trained * blocks + 2.0 * span.num_tokens * mergers)

    return cost
