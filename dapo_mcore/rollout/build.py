"""The rollout engine that the options ask for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from dapo_mcore.config import RolloutBackend, RunConfig
from dapo_mcore.prompts.vision import ImageTokens, load_image_tokens
from dapo_mcore.rollout.colocated import ColocatedEngine
from dapo_mcore.rollout.engine import RolloutEngine
from dapo_mcore.rollout.vllm_engine import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@contextmanager
def rollout_engine(config: RunConfig, hf_tokenizer: PreTrainedTokenizerBase) -> Iterator[RolloutEngine]:
    """Started, and ended with the block if it does not live in this process anyway. Collective.

    Raises:
        RolloutError: an engine did not start.
        ValueError: the model sees pictures, and its folder does not say how.
    """
    vision = load_image_tokens(config.model.path, hf_tokenizer, config.data.max_pixels)  # as the prompts were made
    tokenizer = cast(Tokenizer, hf_tokenizer)  # transformers leaves eos_token_id untyped
    if config.rollout.backend is RolloutBackend.ray:
        with _ray_pool(config, tokenizer, vision) as pool:
            yield pool
    else:
        yield ColocatedEngine(
            config.model,
            config.rollout,
            tokenizer,
            max_prompt_length=config.data.max_prompt_length,
            max_response_length=config.data.max_response_length,
            record_routes=config.actor.moe.router_replay,
            vision=vision,
        )


@contextmanager
def _ray_pool(config: RunConfig, tokenizer: Tokenizer, vision: ImageTokens | None) -> Iterator[RolloutEngine]:
    from dapo_mcore.rollout.ray_engine import EngineArguments  # Ray is loaded by the runs that use it
    from dapo_mcore.rollout.ray_pool import RayPool

    arguments = EngineArguments(
        config.model,
        config.rollout,
        tokenizer,
        config.data.max_prompt_length,
        config.data.max_response_length,
        record_routes=config.actor.moe.router_replay,
        vision=vision,
    )
    pool = RayPool(config.rollout.ray, arguments)
    try:
        yield pool
    finally:
        pool.close()
