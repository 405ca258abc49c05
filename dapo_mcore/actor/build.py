"""A Hugging Face configuration as Megatron's TransformerConfig and GPTModel; these configs are made nowhere else."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from transformers import AutoConfig, PretrainedConfig

from dapo_mcore.actor.parallel import virtual_stages
from dapo_mcore.actor.policy_model import PolicyModel
from dapo_mcore.actor.vision.model import vision_chunk
from dapo_mcore.config import Dtype, MegatronConfig, Recompute, VisionConfig
from dapo_mcore.platform import platform
from dapo_mcore.weights.families import FAMILIES, language_config, text_dims

TORCH_DTYPE = {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16}
FROZEN_TOWER = VisionConfig()
# Megatron holds these as constants.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_hf_config(folder: str | Path) -> PretrainedConfig:
    """The model folder's configuration.

    Raises:
        ValueError: there is none, or Megatron would compute something else than Hugging Face with it.
    """
    try:
        hf = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.path={folder}: no readable config.json in it ({error}); give an HF model folder"
        ) from None
    refuse_unsupported(hf, folder)
    return hf


def refuse_unsupported(hf: PretrainedConfig, folder: str | Path) -> None:
    """ValueError that names the first entry of config.json this project has no equal for."""

    def refuse(entry: str, value: object, supported: str) -> None:
        raise ValueError(f"model.path={folder}: config.json has {entry}={value!r}; supported is {supported}")

    if hf.model_type not in FAMILIES:
        refuse("model_type", hf.model_type, ", ".join(FAMILIES))
    text = language_config(hf)
    if text.hidden_act != "silu":
        refuse("hidden_act", text.hidden_act, "silu")
    if hf.model_type != "qwen2" and getattr(text, "attention_bias", False):
        refuse("attention_bias", True, "false (biases on query, key and value only exist in qwen2)")
    if getattr(text, "mlp_bias", False):
        refuse("mlp_bias", True, "false")
    if text.attention_dropout:
        refuse("attention_dropout", text.attention_dropout, "0")
    if getattr(text, "use_sliding_window", False):
        refuse("use_sliding_window", True, "false: every layer attends to the whole sequence")
    rope = text.rope_parameters
    ropes = ("default", "llama3") if text is hf else ("default",)
    if rope["rope_type"] not in ropes:
        refuse("rope_type", rope["rope_type"], " or ".join(ropes))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        refuse("partial_rotary_factor", rope["partial_rotary_factor"], "1.0")
    for entry, constant in LLAMA3_ROPE.items() if rope["rope_type"] == "llama3" else ():
        if rope[entry] != constant:
            refuse(entry, rope[entry], f"{constant} with rope_type llama3")


def transformer_config(hf: PretrainedConfig, megatron: MegatronConfig, dtype: Dtype) -> TransformerConfig:
    """The layers of `hf` under the layout `megatron`, losses counted per token."""
    has_experts = hf.model_type.endswith("_moe")
    has_te, text, dims = platform().has_transformer_engine, language_config(hf), text_dims(hf, None)
    return TransformerConfig(
        num_layers=dims.layers,
        hidden_size=dims.hidden,
        ffn_hidden_size=dims.ffn,
        num_attention_heads=dims.heads,
        num_query_groups=dims.groups,
        kv_channels=dims.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=text.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=hf.model_type == "qwen2",
        qk_layernorm=hf.model_type.startswith("qwen3"),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        perform_initialization=True,  # overwritten, but it also marks what is cut over TP, which gradient norms rely on
        params_dtype=TORCH_DTYPE[dtype],
        pipeline_dtype=TORCH_DTYPE[dtype],
        bf16=dtype is Dtype.bf16,
        calculate_per_token_loss=True,  # the schedule must not divide by micro-batches
        variable_seq_lengths=True,  # packed micro-batches differ in length
        moe_token_dispatcher_type="alltoall",  # required by variable lengths, for dense models too
        transformer_impl="transformer_engine" if has_te else "local",
        tensor_model_parallel_size=megatron.tensor_model_parallel_size,
        pipeline_model_parallel_size=megatron.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_stages(megatron),
        overlap_p2p_comm=virtual_stages(megatron) is not None,  # two stages would meet in one batch of sends otherwise
        batch_p2p_comm=virtual_stages(megatron) is None,
        context_parallel_size=megatron.context_parallel_size,
        sequence_parallel=megatron.sequence_parallel,
        expert_model_parallel_size=megatron.expert_model_parallel_size,
        expert_tensor_parallel_size=megatron.expert_tensor_parallel_size,
        **_recompute(megatron.recompute),
        moe_grouped_gemm=has_te and has_experts and megatron.moe_grouped_gemm,
        moe_permute_fusion=has_te and megatron.moe_permute_fusion,
        apply_rope_fusion=has_te and megatron.apply_rope_fusion,
        gradient_accumulation_fusion=False,
        deterministic_mode=megatron.deterministic_mode,
        mrope_section=text.rope_parameters.get("mrope_section"),
        **(_experts(text) if has_experts else {}),
    )


def _recompute(recompute: Recompute) -> dict[str, Any]:
    """Every field, as those of the layout: where one is left open, MindSpeed fills in what another model was given."""
    none = {
        "recompute_granularity": None,
        "recompute_method": None,
        "recompute_num_layers": None,
        "recompute_modules": None,
        "distribute_saved_activations": False,
    }
    if recompute is Recompute.full:
        return none | {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if recompute is Recompute.selective:
        return none | {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return none


def _experts(text: Any) -> dict[str, Any]:
    dense = set(text.mlp_only_layers or ())
    is_moe = [i not in dense and (i + 1) % text.decoder_sparse_step == 0 for i in range(text.num_hidden_layers)]
    # Softmax over the chosen experts is the normalised softmax; Qwen3-VL always has that one.
    is_normalised = getattr(text, "norm_topk_prob", True)
    return {
        "num_moe_experts": text.num_experts,
        "moe_router_topk": text.num_experts_per_tok,
        "moe_ffn_hidden_size": text.moe_intermediate_size,
        "moe_layer_freq": [int(moe) for moe in is_moe],
        "moe_router_pre_softmax": not is_normalised,
        "moe_router_score_function": "softmax",
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
    }


def build_chunks(
    hf: PretrainedConfig, config: TransformerConfig, vision: VisionConfig = FROZEN_TOWER
) -> list[PolicyModel]:
    """This rank's part of the model on its device, one chunk per virtual pipeline stage, weights not filled."""
    tp = config.tensor_model_parallel_size
    stages = config.virtual_pipeline_model_parallel_size
    vp_stages = range(stages) if stages else (None,)
    rows = language_config(hf).vocab_size
    return [_build_chunk(hf, config, vision, rows + -rows % tp, vp_stage) for vp_stage in vp_stages]


def _build_chunk(
    hf: PretrainedConfig, config: TransformerConfig, vision: VisionConfig, padded: int, vp_stage: int | None
) -> PolicyModel:
    text = language_config(hf)
    make = _text_chunk if text is hf else partial(vision_chunk, vision=vision)
    where = {"ignore_virtual": False, "vp_stage": vp_stage}
    spec = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=config.transformer_impl == "transformer_engine",
        normalization=config.normalization,
        vp_stage=vp_stage,
    )
    chunk = make(
        hf,
        config,
        spec,
        real_vocab_size=text.vocab_size,
        vocab_size=padded,
        max_sequence_length=text.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(**where),
        post_process=parallel_state.is_pipeline_last_stage(**where),
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        vp_stage=vp_stage,
    )
    _mark_experts(chunk)
    _cast_parameters(chunk, config.params_dtype)
    return chunk.to(platform().device)


def _cast_parameters(chunk: PolicyModel, dtype: torch.dtype) -> None:
    """MindSpeed makes norms in float32 whatever `params_dtype` says, as Megatron's own training casts whole models."""
    for parameter in chunk.parameters():
        parameter.data = parameter.data.to(dtype)


def _text_chunk(
    hf: PretrainedConfig, config: TransformerConfig, spec: TransformerBlockSubmodules, **options: Any
) -> PolicyModel:
    rope = hf.rope_parameters
    return PolicyModel(
        config,
        spec,
        position_embedding_type="rope",
        rotary_base=rope["rope_theta"],
        rope_scaling=rope["rope_type"] == "llama3",
        rope_scaling_factor=rope.get("factor", 1.0),
        **options,
    )


def _mark_experts(chunk: PolicyModel) -> None:
    """Gradients of experts are summed over the ranks that hold the same experts.

    Megatron marks them so only under expert parallelism. Without it, and with expert tensor parallelism below tensor
    parallelism, ranks that hold the same experts but see other tokens would drift apart.
    """
    for name, parameter in chunk.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False
