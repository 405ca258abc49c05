"""Small random models of every supported family, as Hugging Face folders with a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
)

from tools.tiny import sight
from tools.tiny.tokenizer import TOKENS, VOCAB_SIZE, build_tokenizer

# family -> its config class and class of models; what config.json calls model_type is the key
FAMILIES: dict[str, tuple[type[PretrainedConfig], str]] = {
    "llama": (LlamaConfig, "LlamaForCausalLM"),
    "qwen2": (Qwen2Config, "Qwen2ForCausalLM"),
    "qwen3": (Qwen3Config, "Qwen3ForCausalLM"),
    "qwen3_moe": (Qwen3MoeConfig, "Qwen3MoeForCausalLM"),
    "qwen3_vl": (Qwen3VLConfig, "Qwen3VLForConditionalGeneration"),
    "qwen3_vl_moe": (Qwen3VLMoeConfig, "Qwen3VLMoeForConditionalGeneration"),
}
SEEING = ("qwen3_vl", "qwen3_vl_moe")
SIZES = dict(
    vocab_size=VOCAB_SIZE, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, intermediate_size=128, max_position_embeddings=256,  # vLLM's CPU attention has no head_dim below 32
)  # fmt: skip
EXPERTS = dict(
    num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True, router_aux_loss_coef=0.0
)


def tiny_config(family: str, tied: bool = False) -> PretrainedConfig:
    """2 layers of width 64; for qwen3_moe 8 experts, of which a token takes 2 (251,328 parameters).

    What sees has a vision tower of 2 blocks of width 32 beside it, one of which adds its features to the first layer.
    """
    if family not in FAMILIES:
        raise ValueError(f"family={family}: not known; take one of {', '.join(FAMILIES)}")
    config_class, architecture = FAMILIES[family]
    sizes = SIZES | (EXPERTS if family.endswith("_moe") else {})
    if family == "qwen2":  # has no head_dim of its own: it is width / heads
        sizes = sizes | dict(hidden_size=128)
    if family in SEEING:
        return _seeing_config(family, tied, sizes)
    special = dict(eos_token_id=TOKENS.index("<eos>"), pad_token_id=TOKENS.index("<pad>"), bos_token_id=None)
    stated: dict[str, Any] = dict(tie_word_embeddings=tied, architectures=[architecture], dtype="float32")
    return config_class(**sizes, **special, **stated)


def _seeing_config(family: str, tied: bool, sizes: dict[str, Any]) -> PretrainedConfig:
    config_class, architecture = FAMILIES[family]
    ends: dict[str, Any] = dict(
        eos_token_id=sight.token_id(sight.END), pad_token_id=sight.token_id(sight.PAD), bos_token_id=None
    )
    parts: dict[str, Any] = dict(
        text_config={**sizes, **sight.TEXT, **ends},
        vision_config={**sight.TOWER, "out_hidden_size": sizes["hidden_size"]},
    )
    stated: dict[str, Any] = dict(tie_word_embeddings=tied, architectures=[architecture], dtype="float32")
    return config_class(**parts, **stated, **sight.IDS, **ends)


def random_model(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """In fp32, initialised by transformers from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind = AutoModelForImageTextToText if config.model_type in SEEING else AutoModelForCausalLM
        return kind.from_config(config, dtype=torch.float32)


def save_folder(model: PreTrainedModel, out: Path) -> None:
    """Config, generation config, tokenizer or processor, and the weights under the names of published checkpoints."""
    out.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(out)
    GenerationConfig.from_model_config(model.config).save_pretrained(out)
    (sight.build_processor() if model.config.model_type in SEEING else build_tokenizer()).save_pretrained(out)
    save_file(dict(published_tensors(model)), out / "model.safetensors", metadata={"format": "pt"})


def published_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as checkpoints hold them, a tied head left out.

    Of text models one matrix per expert and projection; of those that see all experts in one, transposed.
    """
    is_fused = model.config.model_type in SEEING
    for name, tensor in model.state_dict().items():
        base, _, leaf = name.rpartition(".")
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if is_fused and base.endswith("experts"):
            yield name, tensor.mT.contiguous()
        elif leaf == "gate_up_proj":
            for expert, fused in enumerate(tensor):
                gate, up = fused.chunk(2)
                yield f"{base}.{expert}.gate_proj.weight", gate.clone()
                yield f"{base}.{expert}.up_proj.weight", up.clone()
        elif leaf == "down_proj":
            for expert, matrix in enumerate(tensor):
                yield f"{base}.{expert}.down_proj.weight", matrix.clone()
        else:
            yield name, tensor.clone()
