"""Which Hugging Face configurations are taken, and how the refused ones are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dapo_mcore.actor.build import read_hf_config, transformer_config
from dapo_mcore.config import Dtype, MegatronConfig, Recompute
from tools.certificate.reference import FAMILIES, LLAMA3, SIZES, tiny_model


def folder_with(tmp_path: Path, kind: str, **options: Any) -> Path:
    getattr(transformers, kind + "Config")(**{**SIZES, **options}).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("Gemma", {}, "model_type='gemma'; supported is llama, qwen2, qwen3, qwen3_moe"),
        ("Llama", {"hidden_act": "gelu"}, "hidden_act='gelu'; supported is silu"),
        ("Llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("Llama", {"attention_bias": True}, "attention_bias=True"),
        ("Qwen3", {"attention_bias": True}, "attention_bias=True"),
        ("Qwen3", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("Qwen2", {"use_sliding_window": True, "max_window_layers": 0}, "use_sliding_window=True"),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_type='linear'"),
        ("Llama", {"rope_parameters": {**LLAMA3, "low_freq_factor": 2.0}}, "low_freq_factor=2.0; supported is 1.0"),
        ("Llama", {"rope_parameters": {**LLAMA3, "high_freq_factor": 8.0}}, "high_freq_factor=8.0; supported is 4.0"),
    ],
)
def test_what_megatron_would_compute_differently_is_refused_by_name(
    kind: str, options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"model\.path") as refused:
        read_hf_config(folder_with(tmp_path, kind, **options))
    assert named in str(refused.value)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize("content", [None, "{", json.dumps({"hidden_size": 4})])
def test_a_folder_without_a_readable_config_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.path=.*no readable config\.json"):
        read_hf_config(tmp_path)


def built(family: str, tmp_path: Path, **options: Any) -> Any:
    tiny_model(family).config.save_pretrained(tmp_path)
    return transformer_config(read_hf_config(tmp_path), MegatronConfig(**options), Dtype.bf16)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_dropped_out_and_losses_are_counted_per_token(family: str, tmp_path: Path) -> None:
    config = built(family, tmp_path)
    assert (config.hidden_dropout, config.attention_dropout) == (0.0, 0.0)
    assert config.calculate_per_token_loss
    assert config.variable_seq_lengths
    assert config.params_dtype is torch.bfloat16


def test_some_layers_of_a_mixture_of_experts_may_be_dense(tmp_path: Path) -> None:
    assert built("qwen3_moe_mixed", tmp_path).moe_layer_freq == [0, 1]
    assert built("qwen3_moe", tmp_path).moe_layer_freq == [1, 1]


def test_recompute_is_handed_to_megatron(tmp_path: Path) -> None:
    full = built("qwen3", tmp_path, recompute=Recompute.full)
    selective = built("qwen3", tmp_path, recompute=Recompute.selective)
    assert (full.recompute_granularity, full.recompute_method, full.recompute_num_layers) == ("full", "uniform", 1)
    assert (selective.recompute_granularity, selective.recompute_modules) == ("selective", ["core_attn"])
    assert built("qwen3", tmp_path).recompute_granularity is None


def test_a_cpu_has_no_fused_kernels_whatever_the_options_say(tmp_path: Path) -> None:
    config = built("qwen3_moe", tmp_path, apply_rope_fusion=True, moe_permute_fusion=True, moe_grouped_gemm=True)
    fused = (config.apply_rope_fusion, config.moe_permute_fusion, config.moe_grouped_gemm)
    assert fused == (False, False, False)
