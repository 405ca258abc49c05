"""The truth of the certificate: tiny Hugging Face models in one process, and the loss in plain torch, in float64.

Written without the project's own maths: no function of dapo_mcore or dapo_kernels computes anything here.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from dapo_mcore.config import ActorConfig
from dapo_mcore.types import TrainBatch
from tools.certificate.experts import Routers
from tools.certificate.objective import objective
from tools.certificate.vision import (
    LEVELS,
    ROPE,
    as_published,
    freeze_tower,
    image_inputs,
    save_published,
    seeing_config,
)

VOCAB = 131  # not a multiple of 2: the head has padded columns under tensor parallelism
NOISE = 0.06  # divided by the number of layers, with which the rounding of fp32 grows
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SEEING_EXPERTS = {  # transformers tells transposed matrices by their shapes: the width is no multiple of the experts'
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}
EXPERTS = {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# name -> (class of transformers, what differs from SIZES)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama_tied_scaled_rope": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama_one_kv_group": ("Llama", {"num_key_value_heads": 1}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": False}),
    "qwen3_tied": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": True}),
    "qwen3_moe_unnormed": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": False, "tie_word_embeddings": True}),
    "qwen3_moe_mixed": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [0]}),
    "qwen3_vl": ("Qwen3VL", {"head_dim": 32, "rope_parameters": ROPE}),
    "qwen3_vl_moe": ("Qwen3VLMoe", {"head_dim": 32, "rope_parameters": ROPE, **SEEING_EXPERTS}),
}


def tiny_model(name: str, **sizes: int) -> transformers.PreTrainedModel:
    """float32, seeded; far from uniform logits, from zero biases and from norm weights of one.

    Args:
        sizes: entries of config.json in place of the family's.
    """
    kind, options = FAMILIES[name]
    config = _config(kind, {**SIZES, **options, **sizes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = "ForConditionalGeneration" if sees(config) else "ForCausalLM"
        model = getattr(transformers, kind + head)(config)
        layers = config.get_text_config().num_hidden_layers
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (NOISE / layers))
    return model.float()


def sees(config: Any) -> bool:
    return hasattr(config, "vision_config")


def _config(kind: str, sizes: dict[str, Any]) -> Any:
    if kind.startswith("Qwen3VL"):
        sizes["num_hidden_layers"] *= LEVELS  # the first chunk must hold so many
        return seeing_config(kind, sizes)
    config = getattr(transformers, kind + "Config")(**sizes)
    config._experts_implementation = "eager"
    config._attn_implementation = "eager"
    return config


def save_model(model: transformers.PreTrainedModel, folder: Path) -> None:
    """As it is published."""
    if sees(model.config):
        save_published(model, folder)
    else:
        model.save_pretrained(folder)


def in_float64(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """A copy that computes in float64; Hugging Face's norms would go through float32 whatever the model's dtype.

    The rotation of queries and keys in a vision tower still does.
    """
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            norm: Any = module
            norm.forward = partial(F.rms_norm, normalized_shape=norm.weight.shape, weight=norm.weight,
                                   eps=norm.variance_epsilon)  # fmt: skip
    return model


def random_batch(seed: int, lengths: list[tuple[int, int]], *, old_logprobs: bool) -> TrainBatch:
    """Responses of (prompt, response) `lengths`, a quarter of their tokens masked, advantages of both signs."""
    draw = torch.Generator().manual_seed(seed)
    prompts, responses = (torch.tensor(column) for column in zip(*lengths, strict=True))
    n = int(responses.sum())
    return TrainBatch(
        token_ids=torch.randint(VOCAB, (int((prompts + responses).sum()),), generator=draw),
        prompt_lengths=prompts,
        response_lengths=responses,
        loss_mask=torch.rand(n, generator=draw) < 0.75,
        advantages=torch.randn(n, generator=draw),
        rollout_logprobs=-4.0 - torch.rand(n, generator=draw),
        old_logprobs=-5.0 + 2 * torch.randn(n, generator=draw) if old_logprobs else None,
    )


def response_logprobs(model: transformers.PreTrainedModel, batch: TrainBatch, temperature: float = 1.0) -> Tensor:
    """[N] float64."""
    return chosen(response_distributions(model, batch, temperature), batch)


def chosen(distributions: Tensor, batch: TrainBatch) -> Tensor:
    """[N, V] -> [N]: of the sampled tokens."""
    targets = torch.cat([ids[prompt:] for ids, prompt in _responses(batch)])
    return distributions.gather(1, targets[:, None])[:, 0]


def response_distributions(model: transformers.PreTrainedModel, batch: TrainBatch, temperature: float) -> Tensor:
    """[N, V] float64 log-probabilities: one forward per response, no padding."""
    visuals = batch.visuals or ((),) * len(batch)
    logits = [
        model(ids[None], **image_inputs(model, ids, shown)).logits[0, prompt - 1 : -1].double()
        for (ids, prompt), shown in zip(_responses(batch), visuals, strict=True)
    ]
    return (torch.cat(logits) / temperature).log_softmax(-1)


def _responses(batch: TrainBatch) -> list[tuple[Tensor, int]]:
    """Token ids of prompt and response, and the prompt's length."""
    totals = (batch.prompt_lengths + batch.response_lengths).tolist()
    return list(zip(batch.token_ids.split(totals), batch.prompt_lengths.tolist(), strict=True))


@dataclass(frozen=True)
class Truth:
    """Of one update on one batch."""

    loss: float
    metrics: dict[str, float]  # by the actor's names
    gradients: dict[str, Tensor]  # float64, as the tensors of a published model; 0 where nothing is trained


def dapo_loss(logprobs: Tensor, batch: TrainBatch, options: ActorConfig | None = None) -> Tensor:
    """0-d: eq. 8 of DAPO with the dual clip, over all trained tokens."""
    options = options or ActorConfig()
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs.double()
    ratio = (logprobs - old).exp()
    advantages = batch.advantages.double()
    clipped = ratio.clamp(1 - options.clip_ratio_low, 1 + options.clip_ratio_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    dual = torch.maximum(surrogate, options.clip_ratio_c * advantages)
    surrogate = torch.where(advantages < 0, dual, surrogate)
    return -surrogate[batch.loss_mask].sum() / batch.loss_mask.sum()


def truth(
    model: transformers.PreTrainedModel, batch: TrainBatch, options: ActorConfig | None = None, temperature: float = 1.0
) -> Truth:
    """Loss, metrics and gradients of one update with `options`."""
    options = options or ActorConfig()
    model = in_float64(model)
    if sees(model.config):
        freeze_tower(model, options.vision.train)
    routers = Routers(model, batch, options.moe)
    distributions = response_distributions(model, batch, temperature)
    logprobs = chosen(distributions, batch)
    entropy = -(distributions.exp() * distributions).sum(-1)
    truths = objective(logprobs, entropy, batch, options)
    (truths.loss + routers.loss()).backward()
    as_saved = as_published if sees(model.config) else split_experts
    gradients = as_saved({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()})
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    loss = truths.loss.item()
    found = truths.metrics | routers.metrics()
    return Truth(loss, found | {"actor/loss": loss, "actor/grad_norm": norm.item()}, gradients)


def loss_and_gradients(
    model: transformers.PreTrainedModel, batch: TrainBatch, temperature: float = 1.0
) -> tuple[float, dict[str, Tensor]]:
    exact = truth(model, batch, temperature=temperature)
    return exact.loss, exact.gradients


def split_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers 5 fuses a layer's experts in memory, but not in its files."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for expert, joined in enumerate(tensor):
                gate, up = joined.chunk(2)
                stem = name.removesuffix("gate_up_proj") + str(expert)
                out |= {f"{stem}.gate_proj.weight": gate, f"{stem}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix("down_proj")
            out |= {f"{stem}{expert}.down_proj.weight": down for expert, down in enumerate(tensor)}
        else:
            out[name] = tensor
    return out
