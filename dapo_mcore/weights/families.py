"""One declaration per model family: how every parameter is named and laid out in Hugging Face files, in Megatron-Core
and in vLLM's runtime. Loading, export, strictness and conversion are derived from these tables; there is no other map.

What a declaration consists of is said in `sections`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from dapo_mcore.weights.layouts import Even, GateUp, GroupedQKV, Layout, VocabularyRows, Whole
from dapo_mcore.weights.sections import Family, Form, Param, Section, Stage, either, together
from dapo_mcore.weights.tower import TOWER


@dataclass(frozen=True, slots=True)
class TextDims:
    """Sizes of a decoder, read once from its Hugging Face config."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int  # key-value heads
    head_dim: int
    vocab: int
    padded_vocab: int  # rows of Megatron's embedding
    tied: bool  # the head is the embedding
    experts: int = 0
    expert_ffn: int = 0
    sparse_layers: frozenset[int] = frozenset()  # whose MLP is a mixture of experts


def language_config(hf_config: Any) -> Any:
    """What a Hugging Face config says of the decoder; in vision-language models it is a part of its own."""
    return getattr(hf_config, "text_config", hf_config)


def text_dims(config: Any, padded_vocab: int | None) -> TextDims:
    text = language_config(config)
    return TextDims(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        ffn=text.intermediate_size,
        heads=text.num_attention_heads,
        groups=text.num_key_value_heads,
        # Qwen2's config has no head_dim, Llama's may hold None
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocab=text.vocab_size,
        padded_vocab=padded_vocab or text.vocab_size,
        tied=config.tie_word_embeddings,  # of the whole model: that of a part may differ, and does not count
    )


def moe_dims(config: Any, padded_vocab: int | None) -> TextDims:
    text = language_config(config)
    step, dense = text.decoder_sparse_step, text.mlp_only_layers or ()
    return replace(
        text_dims(config, padded_vocab),
        experts=text.num_experts,
        expert_ffn=text.moe_intermediate_size,
        sparse_layers=frozenset(i for i in range(text.num_hidden_layers) if i not in dense and (i + 1) % step == 0),
    )


def is_dense(dims: TextDims, layer: int) -> bool:
    return layer not in dims.sparse_layers


def is_sparse(dims: TextDims, layer: int) -> bool:
    return layer in dims.sparse_layers


def is_tied(dims: TextDims, layer: int) -> bool:
    return dims.tied


def is_untied(dims: TextDims, layer: int) -> bool:
    return not dims.tied


def vocabulary(dims: TextDims) -> Layout:
    return VocabularyRows(dims.vocab, dims.padded_vocab, dims.hidden)


def norm(hf: str, *mcore: str, size: Callable[[TextDims], int] = lambda d: d.hidden) -> Param:
    return Param(hf=either(hf), mcore=either(*mcore), vllm=either(hf), layout=lambda d: Whole((size(d),)))


# Where Megatron has two names, the second is that of Transformer Engine, which fuses norms into the next linear layer.
INPUT_NORM = norm("input_layernorm.weight", "input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
MLP_NORM = norm("post_attention_layernorm.weight", "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
HEAD_NORMS = tuple(
    norm(f"self_attn.{x}_norm.weight", f"self_attention.{x}_layernorm.weight", size=lambda d: d.head_dim) for x in "qk"
)
QKV = Param(
    hf=together("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    mcore=either("self_attention.linear_qkv.weight"),
    vllm=either("self_attn.qkv_proj.weight"),
    layout=lambda d: GroupedQKV(d.heads, d.groups, d.head_dim, (d.hidden,)),
)
QKV_BIAS = Param(
    hf=together("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    mcore=either("self_attention.linear_qkv.bias"),
    vllm=either("self_attn.qkv_proj.bias"),
    layout=lambda d: GroupedQKV(d.heads, d.groups, d.head_dim, ()),
)
ATTENTION_OUT = Param(
    hf=either("self_attn.o_proj.weight"),
    mcore=either("self_attention.linear_proj.weight"),
    vllm=either("self_attn.o_proj.weight"),
    layout=lambda d: Even((d.hidden, d.heads * d.head_dim), dim=1),
)
DENSE_MLP = (
    Param(
        hf=together("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        mcore=either("mlp.linear_fc1.weight"),
        vllm=either("mlp.gate_up_proj.weight"),
        layout=lambda d: GateUp(d.ffn, d.hidden),
        when=is_dense,
    ),
    Param(
        hf=either("mlp.down_proj.weight"),
        mcore=either("mlp.linear_fc2.weight"),
        vllm=either("mlp.down_proj.weight"),
        layout=lambda d: Even((d.hidden, d.ffn), dim=1),
        when=is_dense,
    ),
)


def experts(hf: tuple[Form, ...], mcore: str, vllm: str, layout: Callable[[TextDims], Layout]) -> Param:
    return Param(
        hf=hf,
        mcore=either(
            f"mlp.experts.local_experts.{{expert}}.{mcore}.weight",  # SequentialMLP
            f"mlp.experts.{mcore}.weight{{expert}}",  # Transformer Engine's grouped linear, MindSpeed's too
        ),
        # The second is the module path of vLLM 0.32, the first that of 0.23.
        vllm=tuple(Form((f"mlp.experts.{path}{vllm}",), stacked=True) for path in ("", "routed_experts.")),
        layout=layout,
        when=is_sparse,
        is_expert=True,
        checkpoint=(Form((f"mlp.experts.experts.{mcore}.weight",), stacked=True),),
    )


ROUTER = Param(
    hf=either("mlp.gate.weight"),
    mcore=either("mlp.router.weight"),
    vllm=either("mlp.gate.weight"),
    layout=lambda d: Whole((d.experts, d.hidden)),
    when=is_sparse,
)


def sparse_mlp(gate_up: tuple[Form, ...], down: tuple[Form, ...]) -> tuple[Param, ...]:
    return (
        ROUTER,
        experts(gate_up, mcore="linear_fc1", vllm="w13_weight", layout=lambda d: GateUp(d.expert_ffn, d.hidden)),
        experts(down, mcore="linear_fc2", vllm="w2_weight", layout=lambda d: Even((d.hidden, d.expert_ffn), dim=1)),
    )


SINGLE_GATE_UP = Form(("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"))
SINGLE_DOWN = Form(("mlp.experts.{expert}.down_proj.weight",))
FUSED_GATE_UP = Form(("mlp.experts.gate_up_proj",), stacked=True)
FUSED_DOWN = Form(("mlp.experts.down_proj",), stacked=True)
# Files carry one tensor per expert and projection; some follow transformers' modules, fused and stacked.
SPARSE_MLP = sparse_mlp((SINGLE_GATE_UP, FUSED_GATE_UP), (SINGLE_DOWN, FUSED_DOWN))
# Those of Qwen3-VL-MoE are fused and stacked, each matrix the other way round than in transformers' modules.
SPARSE_MLP_VL = sparse_mlp(
    (replace(FUSED_GATE_UP, transposed=True), SINGLE_GATE_UP), (replace(FUSED_DOWN, transposed=True), SINGLE_DOWN)
)


def decoder(
    dims: Callable[[Any, int | None], TextDims],
    layer: tuple[Param, ...],
    hf: str = "model.",
    vllm: str = "model.",
    vllm_head: str = "",
) -> tuple[Section, ...]:
    """The sections of a causal language model with these decoder layers; the prefixes differ inside larger models."""
    embedding, head = "embed_tokens.weight", "output_layer.weight"
    return (
        Section(hf, "", vllm, Stage.FIRST, dims, (
            Param(either(embedding), either("embedding.word_embeddings.weight"), either(embedding), vocabulary),
        )),
        Section(f"{hf}layers.{{layer}}.", "decoder.layers.{layer}.", f"{vllm}layers.{{layer}}.", Stage.LAYER, dims,
                layer, repeat=lambda d: d.layers, stateful=("self_attention.core_attention",)),
        Section(hf, "decoder.", vllm, Stage.LAST, dims, (norm("norm.weight", "final_layernorm.weight"),)),
        Section("", "", vllm_head, Stage.LAST, dims, (
            Param(either("lm_head.weight"), either(head), either("lm_head.weight"), vocabulary, when=is_untied),
        )),
        # With tied embeddings a last pipeline stage that is not the first owns a copy, equal only if both are filled.
        Section(hf, "", vllm, Stage.LAST, dims, (
            Param(either(embedding), either(head), either(embedding), vocabulary, when=is_tied, twin="lm_head.weight"),
        )),
    )  # fmt: skip


def vision_language(dims: Callable[[Any, int | None], TextDims], layer: tuple[Param, ...]) -> tuple[Section, ...]:
    """A decoder with these layers, and a vision tower."""
    prefixes = "model.language_model.", "language_model.model.", "language_model."
    return (*decoder(dims, layer, *prefixes), *TOWER)


ATTENTION = (INPUT_NORM, QKV, ATTENTION_OUT)
QWEN3 = (*ATTENTION, *HEAD_NORMS, MLP_NORM, *DENSE_MLP)
FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", decoder(text_dims, (*ATTENTION, MLP_NORM, *DENSE_MLP))),
        Family("qwen2", decoder(text_dims, (*ATTENTION, QKV_BIAS, MLP_NORM, *DENSE_MLP))),
        Family("qwen3", decoder(text_dims, QWEN3)),
        Family("qwen3_moe", decoder(moe_dims, (*QWEN3, *SPARSE_MLP))),
        Family("qwen3_vl", vision_language(text_dims, QWEN3)),
        Family("qwen3_vl_moe", vision_language(moe_dims, (*QWEN3, *SPARSE_MLP_VL))),
    )
}


def family_of(hf_config: Any) -> Family:
    """The family a Hugging Face config belongs to. ValueError for one that is not declared here."""
    family = FAMILIES.get(hf_config.model_type)
    if family is None:
        raise ValueError(f"model_type={hf_config.model_type!r}: its weights are not declared; known families: "
                         f"{', '.join(sorted(FAMILIES))}")  # fmt: skip
    return family
