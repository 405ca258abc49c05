"""What mbridge is asked, and the test after it: tiny models, their Megatron names and Hugging Face weights by formula.

Names are those of a GPTModel with Transformer Engine's layers, as mbridge takes them.
"""

from __future__ import annotations

import hashlib
import zlib

import torch
from torch import Tensor

LAYERS, HIDDEN, FFN, HEADS, GROUPS, HEAD, VOCAB, EXPERTS, EXPERT_FFN = 2, 16, 24, 4, 2, 8, 12, 4, 6
SIZES = {
    "num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS, "vocab_size": VOCAB, "tie_word_embeddings": False,
}  # fmt: skip
MOE = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": EXPERT_FFN}
FAMILIES = {  # class of transformers, what differs from SIZES
    "llama": ("LlamaConfig", {"head_dim": HEAD}),
    "qwen2": ("Qwen2Config", {"num_attention_heads": HIDDEN // HEAD, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": HEAD}),
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": HEAD, **MOE}),
}


def megatron_names(family: str) -> list[str]:
    attention = ["linear_qkv.layer_norm_weight", "linear_qkv.weight", "linear_proj.weight"]
    attention += ["linear_qkv.bias"] if family == "qwen2" else []
    attention += ["q_layernorm.weight", "k_layernorm.weight"] if family.startswith("qwen3") else []
    names = [f"self_attention.{name}" for name in attention]
    if family == "qwen3_moe":
        names += ["pre_mlp_layernorm.weight", "mlp.router.weight"]
        names += [f"mlp.experts.linear_fc{n}.weight{expert}" for n in (1, 2) for expert in range(EXPERTS)]
    else:
        names += ["mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
    layers = [f"decoder.layers.{layer}.{name}" for layer in range(LAYERS) for name in names]
    return ["embedding.word_embeddings.weight", *layers, "decoder.final_layernorm.weight", "output_layer.weight"]


def hf_tensor(family: str, name: str) -> Tensor:
    """float32 whole numbers that depend on name and place: no two tensors, rows or columns are alike."""
    shape = hf_shape(family, name)
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 7919 + zlib.crc32(name.encode())) % 999_983).float().view(shape)


def hf_shape(family: str, name: str) -> tuple[int, ...]:
    qwen2 = family == "qwen2"
    query, key = (HIDDEN, HEAD) if qwen2 else (HEADS * HEAD, GROUPS * HEAD)
    ffn = EXPERT_FFN if ".experts." in name else FFN
    shapes = {
        "embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN), "norm.weight": (HIDDEN,),
        "layernorm.weight": (HIDDEN,), "q_norm.weight": (HEAD,), "k_norm.weight": (HEAD,),
        "q_proj.weight": (query, HIDDEN), "k_proj.weight": (key, HIDDEN), "v_proj.weight": (key, HIDDEN),
        "q_proj.bias": (query,), "k_proj.bias": (key,), "v_proj.bias": (key,), "o_proj.weight": (HIDDEN, query),
        "gate_proj.weight": (ffn, HIDDEN), "up_proj.weight": (ffn, HIDDEN), "down_proj.weight": (HIDDEN, ffn),
        "mlp.gate.weight": (EXPERTS, HIDDEN),
    }  # fmt: skip
    return shapes[max((end for end in shapes if name.endswith(end)), key=len)]


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]
