"""Hugging Face's vision tower, whole on every rank of the first pipeline stage."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from dapo_mcore.config import TowerTraining
from dapo_mcore.platform import platform


def build_tower(
    vision: PretrainedConfig, dtype: torch.dtype, train: TowerTraining, recomputes: bool
) -> PreTrainedModel:
    """In `dtype`, but for the frequencies of its rotary embedding: they stay in fp32. Weights are not filled.

    Args:
        recomputes: the backward pass runs each block once more instead of keeping what it has computed.
    """
    tower: Any = AutoModel.from_config(vision, dtype=torch.float32, attn_implementation=platform().tower_attention)
    tower.requires_grad_(False)
    trained = {
        TowerTraining.frozen: (),
        TowerTraining.mergers: (tower.merger, tower.deepstack_merger_list),
        TowerTraining.all: (tower,),
    }
    for part in trained[train]:
        part.requires_grad_(True)
    for parameter in tower.parameters():
        parameter.data = parameter.data.to(dtype)
        # Each tensor-parallel rank has the whole gradient. Where kernels are not deterministic copies would drift.
        parameter.average_gradients_across_tp_domain = True
    for block in tower.blocks if recomputes else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return tower


def visual_features(tower: PreTrainedModel, images: Sequence[Tensor], sizes: Tensor) -> Tensor:
    """[visual tokens, 1 + levels, hidden]: embeddings, and what is added to the outputs of the first layers.

    Of no image the rows are none, and a blank one is computed all the same: gradients of 0 for every weight of a
    trained tower, without which ranks would wait for each other.

    Args:
        images: pixels [patches, numbers] of each.
        sizes: [images, 2] int64: rows and columns of visual tokens.
    """
    parts: Any = tower
    weight: Tensor = parts.patch_embed.proj.weight
    merge = tower.config.spatial_merge_size
    assert parts.rotary_pos_emb.inv_freq.dtype == torch.float32
    tokens = int(sizes.prod(1).sum())
    if not images:
        images, sizes = [weight.new_zeros(merge**2, weight[0].numel())], sizes.new_ones(1, 2)
    pixels = torch.cat([image.to(weight.device, non_blocking=True) for image in images])
    grids = torch.cat([torch.ones_like(sizes[:, :1]), sizes * merge], 1).to(weight.device)
    out: Any = tower(pixels, grid_thw=grids)
    return torch.stack([out.pooler_output, *out.deepstack_features], 1)[:tokens]
