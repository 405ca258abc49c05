"""Tiny Hugging Face models of every family, what they say about a response, and how a test asks an engine for one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from dapo_mcore.config import Dtype, ModelConfig, RolloutConfig
from dapo_mcore.rollout.engine import Request, request_seed
from dapo_mcore.rollout.vllm_engine import VllmEngine
from dapo_mcore.types import Prompt, Response

EOS = 0
VOCAB = 120  # padded to 128 by the engine
PROMPT_LENGTH = 150  # above the 128 tokens of a KV block: only such prompts can hit the prefix cache
RESPONSE_LENGTH = 24
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the smallest that vLLM's CPU attention takes
    "max_position_embeddings": 4096,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": False}),
    "qwen3 tied": ("Qwen3", {"tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "moe_intermediate_size": 64, "tie_word_embeddings": False}),
    # 48 is padded to 64 by the engine's kernel
    "qwen3_moe tied, odd width": ("Qwen3Moe", {**EXPERTS, "moe_intermediate_size": 48, "tie_word_embeddings": True}),
}


class Letters:
    """Stands for a tokenizer: one character per token."""

    eos_token_id: int | None = None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return "".join(chr(0x100 + token) for token in token_ids if not (skip_special_tokens and token == EOS))


def save_policy(folder: Path, family: str, seed: int, **sizes: Any) -> transformers.PreTrainedModel:
    """A float32 model in `folder`, far enough from uniform logits that wrong weights show; `sizes` replace SIZES."""
    kind, options = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **options, **sizes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.15)
    model = model.float().eval()
    model.save_pretrained(folder)
    return model


def weights_in(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """What a trainer would send: the names and tensors of the checkpoint."""
    yield from load_file(folder / "model.safetensors").items()


def prompts(count: int, length: int = PROMPT_LENGTH) -> list[Prompt]:
    """Random tokens, none of them the end of sequence."""
    tokens = torch.randint(1, VOCAB, (count, length), generator=torch.Generator().manual_seed(9))
    return [Prompt(uid, uid, tuple(row), "", "") for uid, row in enumerate(tokens.tolist())]


def requests(count: int, n: int, length: int = PROMPT_LENGTH) -> list[Request]:
    return [Request(p, i, request_seed(7, 0, p.uid, i)) for p in prompts(count, length) for i in range(n)]


def model_config(folder: Path, dtype: Dtype = Dtype.fp32) -> ModelConfig:
    return ModelConfig(path=str(folder), dtype=dtype)


def rollout_config(**options: Any) -> RolloutConfig:
    return RolloutConfig(**{"kv_cache_mb": 32, "max_num_seqs": 16, **options})


LENGTHS = {"max_prompt_length": PROMPT_LENGTH, "max_response_length": RESPONSE_LENGTH}


@contextmanager
def started(folder: Path, dtype: Dtype = Dtype.fp32) -> Iterator[VllmEngine]:
    """One engine; a process holds one at a time."""
    engine = VllmEngine(model_config(folder, dtype), rollout_config(), Letters(), **LENGTHS)
    try:
        yield engine
    finally:
        engine.close()


@torch.no_grad()
def response_logits(model: transformers.PreTrainedModel, request: Request, response: Response) -> torch.Tensor:
    """[response, vocabulary] float64: the model's logits where each response token was drawn."""
    ids = torch.tensor([request.prompt.token_ids + response.token_ids])
    return model(ids).logits[0, len(request.prompt.token_ids) - 1 : -1].double()


def sampled(logprobs: torch.Tensor, response: Response) -> torch.Tensor:
    """[response]: the entries of [response, vocabulary] at the response's tokens."""
    return logprobs.gather(-1, torch.tensor(response.token_ids)[:, None])[:, 0]


def logprob_error(
    model: transformers.PreTrainedModel, requests: Sequence[Request], responses: Sequence[Response]
) -> float:
    """Largest difference, in nats, between the reported log-probabilities and the model's at temperature 1."""
    return max(
        (sampled(response_logits(model, request, response).log_softmax(-1), response) - torch.tensor(response.logprobs))
        .abs()
        .max()
        .item()
        for request, response in zip(requests, responses, strict=True)
    )
