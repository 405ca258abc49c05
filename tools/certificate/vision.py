"""Tiny models that see, as they are published, and batches that show them images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from dapo_mcore.config import TowerTraining
from dapo_mcore.types import TrainBatch, Visual, VisualSpan

IMAGE = 9  # the placeholder's id
PATCH, MERGE = 4, 2  # pixels per side of a patch, patches per side of a visual token
LEVELS = 2  # of the deepstack: as many layers the first pipeline stage must hold
ROPE = {"rope_type": "default", "rope_theta": 50000.0, "mrope_section": [6, 5, 5]}  # for heads of 32
VISION = {
    "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": PATCH,
    "spatial_merge_size": MERGE, "out_hidden_size": 64, "num_position_embeddings": 16,
    "deepstack_visual_indexes": list(range(LEVELS)),
}  # fmt: skip
# Of the sequences of a batch, in turn: first token, rows and columns of each image. Every fourth shows the first's.
SHOWN = (((2, 2, 4),), (), ((1, 3, 2), (9, 2, 2)), ((2, 2, 4),), ())


def seeing_config(kind: str, text: dict[str, Any]) -> Any:
    """`kind`: Qwen3VL or Qwen3VLMoe; `text`: of the decoder."""
    tied = text.get("tie_word_embeddings", False)
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=VISION, image_token_id=IMAGE, tie_word_embeddings=tied
    )
    config.text_config._experts_implementation = "eager"  # the others have no float64
    return config


def as_published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts fused, and transposed against transformers' modules."""
    return {
        name: tensor.mT.contiguous() if name.endswith(("experts.gate_up_proj", "experts.down_proj")) else tensor
        for name, tensor in tensors.items()
    }


def published(model: transformers.PreTrainedModel) -> dict[str, Tensor]:
    """Names and tensors of public checkpoints."""
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return as_published(state)


def save_published(model: transformers.PreTrainedModel, folder: Path) -> Path:
    model.config.save_pretrained(folder)
    save_file(published(model), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_images(batch: TrainBatch) -> TrainBatch:
    """The batch with the images of SHOWN put into its prompts. Placeholders among the responses' tokens stay, where no
    image is: transformers counts ids.
    """
    pictures: dict[tuple[int, int, int], Tensor] = {}
    sequences, visuals = [], []
    totals = (batch.prompt_lengths + batch.response_lengths).tolist()
    for i, ids in enumerate(batch.token_ids.split(totals)):
        shown = tuple(_visual(pictures, span) for span in SHOWN[i % len(SHOWN)])
        tokens = [IMAGE + 1 if token == IMAGE and shown else token for token in ids.tolist()]
        for visual in shown:
            tokens[visual.span.start : visual.span.start] = [IMAGE] * visual.span.num_tokens
        sequences.append(torch.tensor(tokens))
        visuals.append(shown)
    added = torch.tensor([len(sequence) for sequence in sequences]) - torch.tensor(totals)
    return replace(
        batch,
        token_ids=torch.cat(sequences),
        prompt_lengths=batch.prompt_lengths + added,
        visuals=tuple(visuals),
    )


def _visual(pictures: dict[tuple[int, int, int], Tensor], span: tuple[int, int, int]) -> Visual:
    """Spans alike show one picture."""
    if span not in pictures:
        _, rows, columns = span
        draw = torch.Generator().manual_seed(len(pictures))
        pictures[span] = torch.randn(rows * columns * MERGE**2, 2 * 3 * PATCH**2, generator=draw)
    return Visual(partial(pictures.__getitem__, span), VisualSpan(*span))


def freeze_tower(model: Any, train: TowerTraining) -> None:
    """All of the tower but what is trained, by the names of its weights."""
    for name, parameter in model.model.visual.named_parameters():
        is_merger = name.startswith(("merger.", "deepstack_merger_list."))
        parameter.requires_grad_(train is TowerTraining.all or (train is TowerTraining.mergers and is_merger))


def image_inputs(model: transformers.PreTrainedModel, ids: Tensor, visuals: Sequence[Visual]) -> dict[str, Tensor]:
    """What transformers asks for beside the token ids [tokens] of one sequence; {} for a model of text."""
    if not hasattr(model.config, "vision_config"):
        return {}
    kinds = torch.zeros_like(ids)
    for visual in visuals:
        kinds[visual.span.start : visual.span.start + visual.span.num_tokens] = 1
    inputs = {"mm_token_type_ids": kinds[None]}
    if visuals:
        inputs["image_grid_thw"] = torch.tensor([(1, MERGE * v.span.rows, MERGE * v.span.columns) for v in visuals])
        inputs["pixel_values"] = torch.cat([v.pixels for v in visuals]).to(model.dtype)
    return inputs
