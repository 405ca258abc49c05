"""The vision tower of Qwen3-VL: Hugging Face's own module on Megatron's first pipeline stage, whole on every rank.

Names and shapes are the same in files, beside Megatron's decoder and in vLLM, as long as vLLM does not cut the tower,
either: with one rank per engine, or with mm_encoder_tp_mode="data".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dapo_mcore.weights.boxes import Shape
from dapo_mcore.weights.layouts import Whole
from dapo_mcore.weights.sections import Param, Section, Stage, either


@dataclass(frozen=True, slots=True)
class TowerDims:
    """Sizes of a vision tower, read once from the vision_config."""

    blocks: int
    width: int
    ffn: int
    patch: Shape  # channels, frames, rows, columns
    positions: int
    merged: int  # numbers in the patches that become one visual token
    out: int  # the decoder's width
    levels: int  # blocks whose features are added to the decoder's layers (deepstack)


def tower_dims(config: Any, padded_vocab: int | None) -> TowerDims:
    vision = config.vision_config
    return TowerDims(
        blocks=vision.depth,
        width=vision.hidden_size,
        ffn=vision.intermediate_size,
        patch=(vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size),
        positions=vision.num_position_embeddings,
        merged=vision.hidden_size * vision.spatial_merge_size**2,
        out=vision.out_hidden_size,
        levels=len(vision.deepstack_visual_indexes),
    )


def whole(name: str, shape: Callable[[TowerDims], Shape]) -> Param:
    return Param(either(name), either(name), either(name), lambda d: Whole(shape(d)))


def linear(name: str, rows: Callable[[TowerDims], int], columns: Callable[[TowerDims], int]) -> tuple[Param, ...]:
    """Weight and bias."""
    return whole(f"{name}.weight", lambda d: (rows(d), columns(d))), whole(f"{name}.bias", lambda d: (rows(d),))


def norm(name: str, size: Callable[[TowerDims], int]) -> tuple[Param, ...]:
    return whole(f"{name}.weight", lambda d: (size(d),)), whole(f"{name}.bias", lambda d: (size(d),))


def width(dims: TowerDims) -> int:
    return dims.width


def ffn(dims: TowerDims) -> int:
    return dims.ffn


def merged(dims: TowerDims) -> int:
    return dims.merged


EMBEDDINGS = (
    whole("patch_embed.proj.weight", lambda d: (d.width, *d.patch)),
    whole("patch_embed.proj.bias", lambda d: (d.width,)),
    whole("pos_embed.weight", lambda d: (d.positions, d.width)),
)
BLOCK = (
    *norm("norm1", width),
    *norm("norm2", width),
    *linear("attn.qkv", lambda d: 3 * d.width, width),
    *linear("attn.proj", width, width),
    *linear("mlp.linear_fc1", ffn, width),
    *linear("mlp.linear_fc2", width, ffn),
)
MERGE = (*linear("linear_fc1", merged, merged), *linear("linear_fc2", lambda d: d.out, merged))


def section(prefix: str, params: tuple[Param, ...], repeat: Callable[[TowerDims], int] = lambda d: 1) -> Section:
    names = f"visual.{prefix}"
    return Section(f"model.{names}", names, names, Stage.FIRST, tower_dims, params, repeat)


TOWER = (
    section("", EMBEDDINGS),
    section("blocks.{layer}.", BLOCK, lambda d: d.blocks),
    # It normalises patch by patch, the mergers of the deepstack what they have joined.
    section("merger.", (*norm("norm", width), *MERGE)),
    section("deepstack_merger_list.{layer}.", (*norm("norm", merged), *MERGE), lambda d: d.levels),
)
