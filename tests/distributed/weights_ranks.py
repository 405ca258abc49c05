"""What each rank does for test_weights_megatron: build, load, run, export, save."""

from __future__ import annotations

import dapo_mcore.actor  # noqa: F401  adapts Megatron before its first import

# isort: split
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from safetensors.torch import load_file
from torch import Tensor

from dapo_mcore.actor.build import build_chunks, read_hf_config, transformer_config
from dapo_mcore.actor.packing import MicroBatch, Origin
from dapo_mcore.actor.policy_model import PolicyModel
from dapo_mcore.actor.vision.inputs import vision_inputs
from dapo_mcore.config import Dtype, MegatronConfig
from dapo_mcore.weights import hf_weights, load_hf, save_hf
from tests.vision_packs import all_logits

LENGTHS = (12, 20, 5, 27)
TP, EP, ETP, PP, VPP = "tp", "ep", "etp", "pp", "vpp"


def build(folder: Path, layout: dict[str, int], dtype: Dtype = Dtype.fp32) -> tuple[Any, list[PolicyModel]]:
    """HF config and this rank's chunks under `layout`, every parameter NaN. Groups are made anew."""
    parallel_state.destroy_model_parallel()
    sizes = {
        "tensor_model_parallel_size": layout.get(TP, 1),
        "expert_model_parallel_size": layout.get(EP, 1),
        "expert_tensor_parallel_size": layout.get(ETP, 1),
    }
    pipeline = {
        "pipeline_model_parallel_size": layout.get(PP, 1),
        "virtual_pipeline_model_parallel_size": layout.get(VPP),
    }
    parallel_state.initialize_model_parallel(**sizes, **pipeline)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    hf = read_hf_config(folder)
    config = transformer_config(hf, MegatronConfig(**sizes, sequence_parallel=layout.get(TP, 1) > 1), dtype)
    overlap = {"overlap_p2p_comm": True, "batch_p2p_comm": False} if VPP in layout else {}
    chunks = build_chunks(hf, dataclasses.replace(config, **pipeline, **overlap))
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(torch.nan)
    return hf, chunks


def logits(model: PolicyModel, sequences: list[Tensor]) -> Tensor:
    """[tokens, vocabulary] of a pack."""
    ids, tokens = torch.cat(sequences), torch.arange(sum(LENGTHS))
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=max(LENGTHS), max_seqlen_kv=max(LENGTHS))
    with torch.no_grad():
        origin = Origin(torch.zeros_like(tokens), torch.tensor([len(tokens)]), None, 1, len(tokens))
        vision = vision_inputs([() for _ in sequences], bounds.tolist(), tokens, ids.device)
        return model(MicroBatch(ids[None], packed, tokens, tokens, tokens, origin, vision), all_logits)


def differing(weights: dict[str, Tensor], folder: Path) -> list[str]:
    """Names that are not in both, or whose dtype, shape or bits differ."""
    truth = load_file(folder / "model.safetensors")
    if "lm_head.weight" in truth and "lm_head.weight" not in weights:  # a repeated tied head
        del truth["lm_head.weight"]
    return sorted(
        name
        for name in weights.keys() | truth.keys()
        if not (name in weights and name in truth and weights[name].dtype == truth[name].dtype
                and torch.equal(weights[name], truth[name]))
    )  # fmt: skip


def round_trip(folder: Path, truth: Path, sequences: list[Tensor], layout: dict[str, int]) -> dict[str, Any]:
    """Load `folder`; compare logits with those of HF, the export with `truth`."""
    hf, chunks = build(folder, layout)
    load_hf(chunks, folder, hf)
    exported = {name: tensor.clone() for name, tensor in hf_weights(chunks, hf)}
    result = {
        "unfilled": [name for chunk in chunks for name, p in chunk.named_parameters() if p.isnan().any()],
        "differing": differing(exported, truth),
        "order": list(exported),
    }
    if PP not in layout:
        result["logits"] = logits(chunks[0], sequences)
    return result


def transformer_engine_round_trip(folder: Path) -> dict[str, Any]:
    """As `round_trip`, with the parameters under the names they bear in Transformer Engine's layers."""
    hf, chunks = build(folder, {})
    for layer in chunks[0].decoder.layers:
        move_parameter(layer.input_layernorm, "weight", layer.self_attention.linear_qkv, "layer_norm_weight")
        if not hasattr(layer.mlp, "experts"):
            move_parameter(layer.pre_mlp_layernorm, "weight", layer.mlp.linear_fc1, "layer_norm_weight")
            continue
        local = layer.mlp.experts.local_experts
        for name in ("linear_fc1", "linear_fc2"):
            grouped = torch.nn.Module()
            for expert, mlp in enumerate(local):
                move_parameter(getattr(mlp, name), "weight", grouped, f"weight{expert}")
            setattr(layer.mlp.experts, name, grouped)
    load_hf(chunks, folder, hf)
    return {
        "differing": differing(dict(hf_weights(chunks, hf)), folder),
        "names": sorted(dict(chunks[0].named_parameters())),
    }


def move_parameter(source: torch.nn.Module, name: str, target: torch.nn.Module, new_name: str) -> None:
    target.register_parameter(new_name, getattr(source, name))
    delattr(source, name)


def run_all(tasks: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    return [function(*arguments) for function, arguments in tasks]


def converted_and_saved(folder: Path, out: Path, layout: dict[str, int]) -> dict[str, Any]:
    """bf16 parameters from an fp32 folder; several files; then a save that fails on rank 0 alone."""
    hf, chunks = build(folder, layout, Dtype.bf16)
    load_hf(chunks, folder, hf)
    save_hf(hf_weights(chunks, hf), hf, folder, out, max_shard_bytes=100_000)
    try:
        save_hf(hf_weights(chunks, hf), hf, folder / "nowhere", out)
    except ValueError as error:
        return {"failure": str(error)}
    return {"failure": None}


def refusals(folder: Path, broken: Path) -> dict[str, str]:
    """Error messages for chunks that do not fit, and for a folder that does not."""

    def message(attempt: Any) -> str:
        try:
            attempt()
        except ValueError as error:
            return str(error)
        return ""

    hf, chunks = build(folder, {})
    messages = {"folder": message(lambda: load_hf(chunks, broken, hf))}
    extra, gone = torch.nn.Parameter(torch.zeros(1)), chunks[0].decoder.layers[1].mlp.experts.local_experts[2]
    chunks[0].decoder.extra = extra
    del gone.linear_fc2.weight
    router = chunks[0].decoder.layers[0].mlp.router
    router.weight = torch.nn.Parameter(router.weight[:-1].clone())
    messages["chunks"] = message(lambda: load_hf(chunks, folder, hf))
    messages["export"] = message(lambda: next(hf_weights(chunks, hf)))
    return messages
