from types import SimpleNamespace

import pytest

from dapo_mcore.weights.families import FAMILIES, family_of
from dapo_mcore.weights.names import expert_names, hf_shapes, parameters

SIZES = SimpleNamespace(
    num_hidden_layers=2, hidden_size=8, intermediate_size=12, num_attention_heads=4, head_dim=4,
    num_key_value_heads=2, vocab_size=11, tie_word_embeddings=False,
    num_experts=2, moe_intermediate_size=6, decoder_sparse_step=1, mlp_only_layers=[0],
)  # fmt: skip


VISION = SimpleNamespace(
    depth=2, hidden_size=4, intermediate_size=6, in_channels=3, temporal_patch_size=2, patch_size=2,
    spatial_merge_size=2, out_hidden_size=8, num_position_embeddings=9, deepstack_visual_indexes=[0],
)  # fmt: skip


def config(model_type, **changes):
    whole = {**vars(SIZES), "model_type": model_type, **changes}
    if "_vl" in model_type:
        whole |= {"text_config": SimpleNamespace(**whole), "vision_config": VISION}
    return SimpleNamespace(**whole)


def test_names_and_shapes_of_a_mixture_of_experts_with_one_dense_layer():
    attention = {
        "input_layernorm.weight": (8,),
        "self_attn.q_proj.weight": (16, 8),
        "self_attn.k_proj.weight": (8, 8),
        "self_attn.v_proj.weight": (8, 8),
        "self_attn.o_proj.weight": (8, 16),
        "self_attn.q_norm.weight": (4,),
        "self_attn.k_norm.weight": (4,),
        "post_attention_layernorm.weight": (8,),
    }
    dense = {"mlp.gate_proj.weight": (12, 8), "mlp.up_proj.weight": (12, 8), "mlp.down_proj.weight": (8, 12)}
    sparse = {"mlp.gate.weight": (2, 8)}
    for expert in (0, 1):
        sparse |= {f"mlp.experts.{expert}.{x}_proj.weight": (6, 8) for x in ("gate", "up")}
        sparse |= {f"mlp.experts.{expert}.down_proj.weight": (8, 6)}
    assert hf_shapes(config("qwen3_moe")) == {
        "model.embed_tokens.weight": (11, 8),
        **{f"model.layers.0.{name}": shape for name, shape in {**attention, **dense}.items()},
        **{f"model.layers.1.{name}": shape for name, shape in {**attention, **sparse}.items()},
        "model.norm.weight": (8,),
        "lm_head.weight": (11, 8),
    }


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_tied_model_has_no_head_of_its_own(family):
    tied, untied = (hf_shapes(config(family, tie_word_embeddings=tied)) for tied in (True, False))
    assert untied.keys() - tied.keys() == {"lm_head.weight"}


def test_only_qwen2_has_biases_and_only_qwen3_has_head_norms():
    def families_with(end):
        return {family for family in FAMILIES if any(name.endswith(end) for name in hf_shapes(config(family)))}

    assert families_with("q_proj.bias") == {"qwen2"}
    assert families_with("q_norm.weight") == {"qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_moe"}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_no_name_is_declared_twice_on_any_side(family):
    """Embedding and head share a tied vLLM module, and Megatron's twin: those are declared as a second home."""
    rows = [p for p in parameters(config(family)) if not p.row.twin]
    for forms in (lambda p: p.hf_forms, lambda p: p.mcore_forms(p.layer), lambda p: p.vllm_forms):
        names = [name for p in rows for form in forms(p) for name in expert_names(form, 0)]
        assert len(names) == len(set(names))


def test_megatron_names_cover_local_layers_and_transformer_engine():
    names = {n for p in parameters(config("qwen3_moe")) for f in p.mcore_forms(p.layer) for n in expert_names(f, 1)}
    assert names >= {
        "decoder.layers.0.input_layernorm.weight",
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.0.pre_mlp_layernorm.weight",
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.1.mlp.experts.local_experts.1.linear_fc1.weight",
        "decoder.layers.1.mlp.experts.linear_fc2.weight1",
    }


def test_vllm_names_cover_both_module_paths_of_experts():
    names = {name for p in parameters(config("qwen3_moe")) for form in p.vllm_forms for name in form.names}
    assert names >= {
        "model.layers.1.self_attn.qkv_proj.weight",
        "model.layers.0.mlp.gate_up_proj.weight",
        "model.layers.1.mlp.experts.w13_weight",
        "model.layers.1.mlp.experts.routed_experts.w2_weight",
        "lm_head.weight",
    }


def test_names_of_a_decoder_beside_a_tower_have_prefixes_in_files_and_in_vllm_but_none_in_megatron():
    rows = {p.mcore_forms(p.layer)[0].names[0]: p for p in parameters(config("qwen3_vl_moe"))}
    found = {
        name: (rows[name].hf_forms[0].names[0], rows[name].vllm_forms[-1].names[0])
        for name in ("embedding.word_embeddings.weight", "output_layer.weight", "visual.merger.norm.weight",
                     "decoder.layers.1.mlp.experts.local_experts.{expert}.linear_fc2.weight")
    }  # fmt: skip
    stem = "language_model.layers.1.mlp.experts"
    assert found == {
        "embedding.word_embeddings.weight": (
            "model.language_model.embed_tokens.weight",
            "language_model.model.embed_tokens.weight",
        ),
        "output_layer.weight": ("lm_head.weight", "language_model.lm_head.weight"),
        "visual.merger.norm.weight": ("model.visual.merger.norm.weight", "visual.merger.norm.weight"),
        "decoder.layers.1.mlp.experts.local_experts.{expert}.linear_fc2.weight": (
            f"model.{stem}.down_proj",
            "language_model.model.layers.1.mlp.experts.routed_experts.w2_weight",
        ),
    }


def test_an_unknown_family_is_refused_by_name_with_the_known_ones():
    with pytest.raises(ValueError, match=r"model_type='gpt2'.*llama, qwen2, qwen3, qwen3_moe"):
        family_of(config("gpt2"))
