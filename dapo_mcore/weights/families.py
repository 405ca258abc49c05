"""One declaration per model family: how every parameter is named and laid out in Hugging Face files, in Megatron-Core
and in vLLM's runtime. Loading, export, strictness and conversion are derived from these tables; there is no other map.

Names are relative to their section. `{layer}` counts from 0: over the whole model in Hugging Face and vLLM, within a
model chunk in Megatron. `{expert}` counts over all experts in Hugging Face, over a rank's own experts in Megatron.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from dapo_mcore.weights.layouts import Even, GateUp, GroupedQKV, Layout, VocabularyRows, Whole


@dataclass(frozen=True, slots=True)
class Form:
    """The tensors that hold one parameter together, or one expert's part of it."""

    names: tuple[str, ...]
    stacked: bool = False  # one tensor with all experts along dimension 0, the parts of each already joined
    transposed: bool = False  # the matrix of each expert lies transposed


@dataclass(frozen=True, slots=True)
class Param:
    """A row of the table. Of several forms exactly one is met; Hugging Face files are written in the first.

    A row with a `twin` is Megatron's second home of a parameter declared above: filled where a chunk has it, never
    exported. The twin is the Hugging Face name under which some files repeat the parameter.

    Distributed checkpoints use the names of `mcore`, all experts along an axis, unless `checkpoint` gives another.
    """

    hf: tuple[Form, ...]
    mcore: tuple[Form, ...]
    vllm: tuple[Form, ...]
    layout: Callable[[Any], Layout]  # from the section's dims
    when: Callable[[Any, int], bool] = lambda dims, layer: True
    is_expert: bool = False  # one per expert: spread over expert parallel ranks, cut over expert tensor parallel ranks
    twin: str = ""
    checkpoint: tuple[Form, ...] = ()


class Stage(Enum):
    """The pipeline stage that holds a section."""

    FIRST = "first"
    LAYER = "layer"  # the one that holds decoder layer `layer`
    LAST = "last"


@dataclass(frozen=True, slots=True)
class Section:
    """Parameters that share their prefixes, their stage and the number of times they repeat."""

    hf: str
    mcore: str
    vllm: str
    stage: Stage
    dims: Callable[[Any, int | None], Any]  # of (Hugging Face config, padded vocabulary)
    params: tuple[Param, ...]
    repeat: Callable[[Any], int] = lambda dims: 1  # from the dims
    stateful: tuple[str, ...] = ()  # modules of Megatron that have no parameters but an entry in checkpoints


@dataclass(frozen=True, slots=True)
class Family:
    model_type: str  # of the Hugging Face config
    sections: tuple[Section, ...]


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


def text_dims(config: Any, padded_vocab: int | None) -> TextDims:
    return TextDims(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        heads=config.num_attention_heads,
        groups=config.num_key_value_heads,
        # Qwen2's config has no head_dim, Llama's may hold None
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab=config.vocab_size,
        padded_vocab=padded_vocab or config.vocab_size,
        tied=config.tie_word_embeddings,
    )


def moe_dims(config: Any, padded_vocab: int | None) -> TextDims:
    step, dense = config.decoder_sparse_step, config.mlp_only_layers or ()
    return replace(
        text_dims(config, padded_vocab),
        experts=config.num_experts,
        expert_ffn=config.moe_intermediate_size,
        sparse_layers=frozenset(i for i in range(config.num_hidden_layers) if i not in dense and (i + 1) % step == 0),
    )


def together(*names: str) -> tuple[Form, ...]:
    """One form of several tensors."""
    return (Form(names),)


def either(*names: str) -> tuple[Form, ...]:
    """Several forms of one tensor."""
    return tuple(Form((name,)) for name in names)


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
# Files carry one tensor per expert and projection; some follow transformers' modules, fused and stacked.
SPARSE_MLP = (
    ROUTER,
    experts(
        (
            *together("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
            Form(("mlp.experts.gate_up_proj",), stacked=True),
        ),
        mcore="linear_fc1",
        vllm="w13_weight",
        layout=lambda d: GateUp(d.expert_ffn, d.hidden),
    ),
    experts(
        (*together("mlp.experts.{expert}.down_proj.weight"), Form(("mlp.experts.down_proj",), stacked=True)),
        mcore="linear_fc2",
        vllm="w2_weight",
        layout=lambda d: Even((d.hidden, d.expert_ffn), dim=1),
    ),
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


ATTENTION = (INPUT_NORM, QKV, ATTENTION_OUT)
FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", decoder(text_dims, (*ATTENTION, MLP_NORM, *DENSE_MLP))),
        Family("qwen2", decoder(text_dims, (*ATTENTION, QKV_BIAS, MLP_NORM, *DENSE_MLP))),
        Family("qwen3", decoder(text_dims, (*ATTENTION, *HEAD_NORMS, MLP_NORM, *DENSE_MLP))),
        Family("qwen3_moe", decoder(moe_dims, (*ATTENTION, *HEAD_NORMS, MLP_NORM, *DENSE_MLP, *SPARSE_MLP))),
    )
}


def family_of(hf_config: Any) -> Family:
    """The family a Hugging Face config belongs to. ValueError for one that is not declared here."""
    family = FAMILIES.get(hf_config.model_type)
    if family is None:
        raise ValueError(f"model_type={hf_config.model_type!r}: its weights are not declared; known families: "
                         f"{', '.join(sorted(FAMILIES))}")  # fmt: skip
    return family
