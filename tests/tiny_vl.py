"""Tiny random Qwen3-VL models."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tools.certificate.vision import IMAGE, MERGE, PATCH, ROPE, published, save_published, seeing_config

__all__ = ["IMAGE", "KINDS", "MERGE", "PATCH", "VOCAB", "published", "save_published", "tiny_vl"]

VOCAB = 132
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "rope_parameters": ROPE,
}  # fmt: skip
# The width is neither the experts' nor twice that: transformers tells transposed matrices by their shapes.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [3]}
KINDS = {"qwen3_vl": ("Qwen3VL", {}), "qwen3_vl_moe": ("Qwen3VLMoe", EXPERTS)}


def tiny_vl(model_type: str, tied: bool = False) -> transformers.PreTrainedModel:
    """In fp32, far from uniform logits and from norms of weight one."""
    kind, options = KINDS[model_type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = seeing_config(kind, {**TEXT, **options, "tie_word_embeddings": tied})
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
