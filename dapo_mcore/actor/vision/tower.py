"""Hugging Face's vision tower, whole on every rank of the first pipeline stage, and never trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from dapo_mcore.platform import platform


def build_tower(vision: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """In `dtype`, but for the frequencies of its rotary embedding: they stay in fp32. Weights are not filled."""
    tower: PreTrainedModel = AutoModel.from_config(
        vision, dtype=torch.float32, attn_implementation=platform().tower_attention
    )
    tower.requires_grad_(False)
    for parameter in tower.parameters():
        parameter.data = parameter.data.to(dtype)
    return tower


@torch.no_grad()
def visual_features(tower: PreTrainedModel, pixels: Tensor, sizes: Tensor) -> Tensor:
    """[visual tokens, 1 + levels, hidden]: embeddings, and what is added to the outputs of the first layers.

    Args:
        pixels: [patches, numbers], image after image.
        sizes: [images, 2] int64: rows and columns of visual tokens.
    """
    grids = torch.cat([torch.ones_like(sizes[:, :1]), sizes * tower.config.spatial_merge_size], 1)
    out: Any = tower(pixels, grid_thw=grids)
    return torch.stack([out.pooler_output, *out.deepstack_features], 1)
