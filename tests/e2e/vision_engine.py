"""vLLM's modules of vision-language models, without an engine around them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file

from dapo_mcore.rollout.vllm_env import prepare_environment
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
