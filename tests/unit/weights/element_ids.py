"""What every rank holds before and after a push, as numpy matrices of element numbers.

Written from Megatron's and vLLM's own rules, name by name, without the package's layouts and placements.
"""

from types import SimpleNamespace

import numpy as np

MCORE_PAD, UNWRITTEN = -2, -1
VISION = {
    "depth": 1, "hidden_size": 2, "intermediate_size": 3, "in_channels": 1, "temporal_patch_size": 1, "patch_size": 2,
    "spatial_merge_size": 1, "num_position_embeddings": 4, "deepstack_visual_indexes": [0],
}  # fmt: skip


def config(model_type, **sizes):
    """Every size divides by 8 where a rank could cut it; with 4 numbers per head even one group does."""
    text = {
        "num_hidden_layers": 4, "hidden_size": 2, "intermediate_size": 8,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 70,
        "tie_word_embeddings": False, "num_experts": 8, "moe_intermediate_size": 8, "decoder_sparse_step": 1,
        "mlp_only_layers": [0], **sizes,
    }  # fmt: skip
    if "_vl" not in model_type:
        return SimpleNamespace(model_type=model_type, **text)
    tied, vision = text.pop("tie_word_embeddings"), SimpleNamespace(**VISION, out_hidden_size=text["hidden_size"])
    whole = {"text_config": SimpleNamespace(**text), "vision_config": vision, "tie_word_embeddings": tied}
    return SimpleNamespace(model_type=model_type, **whole)


def language(hf):
    return hf.text_config if "_vl" in hf.model_type else hf


def numbered(rows):
    """(parameter, expert) -> its Hugging Face tensors as matrices; every element has a number of its own."""
    tensors, first = {}, 0
    for index, row in enumerate(rows):
        for expert in range(row.experts) if row.experts else (-1,):
            parts = []
            for shape in row.layout.hf_shapes:
                matrix = np.arange(first, first + np.prod(shape)).reshape(shape[0], -1)
                first += matrix.size
                parts.append(matrix)
            tensors[index, expert] = parts
    return tensors


def kind(row):
    name = row.hf_forms[0].names[0].removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    return {"q_proj": "qkv", "gate_proj": "gate_up", "gate_up_proj": "gate_up", "o_proj": "columns",
            "down_proj": "columns", "embed_tokens": "rows", "lm_head": "rows"}.get(name, "whole")  # fmt: skip


def megatron(row, tensors, part, parts, hf):
    if kind(row) == "qkv":
        groups = [t.reshape(language(hf).num_key_value_heads, -1, t.shape[1]) for t in tensors]
        interleaved = np.concatenate(groups, axis=1).reshape(-1, tensors[0].shape[1])
        return np.split(interleaved, parts)[part]
    if kind(row) == "rows":
        padded = np.pad(tensors[0], ((0, -len(tensors[0]) % parts), (0, 0)), constant_values=MCORE_PAD)
        return np.split(padded, parts)[part]
    return _alike(row, tensors, part, parts)


def vllm(row, tensors, part, parts, hf):
    if kind(row) == "qkv":
        query, *others = (t.reshape(-1, language(hf).head_dim, t.shape[1]) for t in tensors)
        heads = max(language(hf).num_key_value_heads // parts, 1)
        first = part * language(hf).num_key_value_heads // parts
        mine = [np.split(query, parts)[part], *(other[first : first + heads] for other in others)]
        return np.concatenate(mine).reshape(-1, query.shape[2])
    if kind(row) == "rows":
        padded = np.pad(tensors[0], ((0, -len(tensors[0]) % 64), (0, 0)), constant_values=UNWRITTEN)
        return np.split(padded, parts)[part]
    return _alike(row, tensors, part, parts)


def _alike(row, tensors, part, parts):
    """What both cut in the same way."""
    if kind(row) == "gate_up":
        return np.concatenate([np.split(half, parts)[part] for half in tensors])
    return np.split(tensors[0], parts, axis=1)[part] if kind(row) == "columns" else tensors[0]


def before(rows, tensors, hf, *, ranks, tp=1, pp=1, vpp=1, cp=1, ep=1, etp=1):
    """For each rank what Megatron holds: {(parameter, expert): matrix}."""
    dense = np.arange(ranks).reshape(pp, -1, cp, tp)
    sparse = np.arange(ranks).reshape(pp, -1, ep, etp)
    per_chunk = language(hf).num_hidden_layers // (pp * vpp)
    held = [{} for _ in range(ranks)]
    for (index, expert), parts in tensors.items():
        row = rows[index]
        stage = {"first": 0, "last": pp - 1, "layer": row.layer // per_chunk % pp}[row.section.stage.value]
        if expert >= 0:
            grid, size = sparse[stage, :, expert // (row.experts // ep)], etp
        else:
            grid, size = dense[stage].reshape(-1, tp), tp
        for part in range(size):
            for rank in grid[:, part]:
                held[rank][index, expert] = megatron(row, parts, part, size, hf)
    return held


def after(rows, tensors, hf, *, ranks, tp=1, ep=1):
    """For each rank what vLLM must hold; UNWRITTEN where it pads."""
    held = [{} for _ in range(ranks)]
    for rank in range(ranks):
        for (index, expert), parts in tensors.items():
            row = rows[index]
            if row.row.twin:
                continue
            if expert >= 0 and ep > 1:
                owner = next(i for i, own in enumerate(np.array_split(np.arange(row.experts), ep)) if expert in own)
                if owner == rank % ep:
                    held[rank][index, expert] = vllm(row, parts, 0, 1, hf)
            else:
                held[rank][index, expert] = vllm(row, parts, rank % tp, tp, hf)
    return held
