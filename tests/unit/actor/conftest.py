"""A world of one rank for tests that build whole actors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dapo_mcore.actor import parallel
from dapo_mcore.actor.actor import Actor, build_actor
from dapo_mcore.config import ActorConfig, Dtype, MegatronConfig, ModelConfig, OptimConfig
from tools.certificate.reference import tiny_model

MakeActor = Callable[..., Actor]


@pytest.fixture(scope="package", autouse=True)
def world_of_one() -> Iterator[None]:
    """With Megatron's groups, which are the same whatever else the options say.

    Made once: actors lie in reference cycles and keep their groups alive, whose threads take the processor from
    everybody else.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    parallel.init_process_group()
    parallel.init_model_parallel(MegatronConfig(), seed=0)
    yield
    parallel.destroy_model_parallel()
    if dist.is_initialized():  # an engine of vLLM that ended in this process may have ended the world, too
        dist.destroy_process_group()
    torch.set_num_threads(threads)


@pytest.fixture
def make_actor(tmp_path: Path) -> MakeActor:
    """make_actor(family, dtype=, total_steps=, megatron={}, **options of ActorConfig)."""

    def make(
        family: str,
        dtype: Dtype = Dtype.fp32,
        total_steps: int = 10,
        megatron: dict[str, Any] | None = None,
        **options: Any,
    ) -> Actor:
        layout = MegatronConfig(**(megatron or {"use_distributed_optimizer": False}))
        options = {"optim": OptimConfig(lr=0.0, clip_grad=1e9), "ppo_max_token_len_per_gpu": 64, **options}
        tiny_model(family).save_pretrained(tmp_path / family)
        model = ModelConfig(path=str(tmp_path / family), dtype=dtype)
        return build_actor(model, ActorConfig(megatron=layout, **options), total_steps)

    return make
