"""vLLM's modules of vision-language models, and an engine that such a policy is pushed into."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file

from dapo_mcore.actor import parallel
from dapo_mcore.actor.actor import build_actor
from dapo_mcore.config import ActorConfig, MegatronConfig
from dapo_mcore.handover import plan_push
from dapo_mcore.rollout.colocated import ColocatedEngine
from dapo_mcore.rollout.engine import Request, Sampling, generate
from dapo_mcore.rollout.leader import lead
from dapo_mcore.rollout.vllm_env import prepare_environment
from dapo_mcore.types import Response
from tests.e2e.tiny_policies import model_config, rollout_config, weights_in
from tests.e2e.tiny_vl_policies import LENGTHS, image_tokens, tokenizer
from tests.tiny_vl import KINDS

Shapes = dict[str, tuple[int, ...]]


def parameters_of(folders: dict[str, Path]) -> dict[str, tuple[Shapes, set[str]]]:
    """By model_type: how vLLM's parameters are called and shaped, and those that the folder's files do not fill.

    A mixture of experts must come first: vLLM makes its groups for the first model.
    """
    found: dict[str, tuple[Shapes, set[str]]] = {}
    for (model_type, folder), model in zip(folders.items(), _models(folders), strict=True):
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        left_out = shapes.keys() - model.load_weights(load_file(folder / "model.safetensors").items())
        found[model_type] = shapes, left_out
    return found


def _models(folders: dict[str, Path]) -> Iterator[Any]:
    prepare_environment()  # before vLLM is imported
    from vllm import EngineArgs
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.model_executor.model_loader.utils import initialize_model

    for model_type, folder in folders.items():
        _complete(folder / "config.json", f"{KINDS[model_type][0]}ForConditionalGeneration")
        sizes = {"max_model_len": 128, "max_num_batched_tokens": 256, "kv_cache_memory_bytes": 1 << 26}
        args = EngineArgs(str(folder), skip_tokenizer_init=True, dtype="float32", enable_chunked_prefill=False, **sizes)
        config = args.create_engine_config()
        with set_current_vllm_config(config):
            init_distributed_environment(dist.get_world_size(), dist.get_rank(), local_rank=0, backend="gloo")
            ensure_model_parallel_initialized(1, 1)
            model = initialize_model(vllm_config=config)
        yield model


def _complete(config: Path, architecture: str) -> None:
    """With what published files state and transformers does not write."""
    stated = json.loads(config.read_text())
    text = stated["text_config"] | {"norm_topk_prob": True}
    config.write_text(json.dumps(stated | {"architectures": [architecture], "text_config": text}))


def pushed_and_loaded(first: Path, second: Path, requests: list[Request], sampling: Sampling) -> dict[str, Any]:
    """An engine over all ranks samples from the first policy; then from the second, loaded from its file and pushed
    from Megatron's model, whose experts are spread over the ranks.
    """
    ranks = dist.get_world_size()
    megatron = MegatronConfig(expert_model_parallel_size=ranks)
    rollout = rollout_config(tensor_model_parallel_size=ranks)
    parallel.init_model_parallel(megatron, seed=0)
    policy = build_actor(model_config(second), ActorConfig(megatron=megatron), total_steps=1)
    options = {"record_routes": True, "vision": image_tokens(first), **LENGTHS}
    engine = ColocatedEngine(model_config(first), rollout, tokenizer(), **options)
    push = plan_push(megatron, rollout, policy.hf_config, policy.chunks, bucket_mb=1)

    def sample() -> list[Response]:
        return lead(lambda: generate(engine, requests, sampling), engine)

    answers: dict[str, Any] = {"obstacle": engine.examine(lambda runtime: runtime.obstacle or push.misfit(runtime))}
    engine.load(weights_in(second), 1)
    answers["loaded"] = sample()
    engine.load(weights_in(first), 0)
    answers["before"] = sample()
    engine.write(push, 1)
    answers["pushed"] = sample()
    return answers
