"""Tiny random Qwen3-VL models, and their folders as they are published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

VOCAB, IMAGE = 132, 9  # IMAGE: the placeholder's id
PATCH, MERGE = 4, 2  # pixels per side of a patch, patches per side of a visual token
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0, "mrope_section": [6, 5, 5]},
}  # fmt: skip
# The width is neither the experts' nor twice that: transformers tells transposed matrices by their shapes.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [3]}
VISION = {
    "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": PATCH,
    "spatial_merge_size": MERGE, "out_hidden_size": 64, "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
}  # fmt: skip
KINDS = {"qwen3_vl": ("Qwen3VL", {}), "qwen3_vl_moe": ("Qwen3VLMoe", EXPERTS)}


def tiny_vl(model_type: str, tied: bool = False) -> transformers.PreTrainedModel:
    """In fp32, far from uniform logits and from norms of weight one."""
    kind, options = KINDS[model_type]
    config = getattr(transformers, f"{kind}Config")(
        text_config={**TEXT, **options}, vision_config=VISION, image_token_id=IMAGE, tie_word_embeddings=tied
    )
    config.text_config._experts_implementation = "eager"  # the others have no float64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def published(model: transformers.PreTrainedModel) -> dict[str, Tensor]:
    """Names and tensors of public checkpoints."""
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return as_published(state)


def as_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts fused, and transposed against transformers' modules."""
    return {
        name: tensor.mT.contiguous() if name.endswith(("experts.gate_up_proj", "experts.down_proj")) else tensor
        for name, tensor in state.items()
    }


def save_published(model: transformers.PreTrainedModel, folder: Path) -> Path:
    model.config.save_pretrained(folder)
    save_file(published(model), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
