"""What vLLM is given for a request, and whether it makes the tokens of it that the policy will be trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dapo_mcore.rollout.engine import Request
from dapo_mcore.types import EncodedImage, Prompt

if TYPE_CHECKING:
    from PIL.Image import Image

    from dapo_mcore.prompts.vision import ImageTokens


def options_for_pictures(vision: ImageTokens | None, max_model_len: int) -> dict[str, Any]:
    """The arguments of vLLM's engine by which it sees pictures as `vision` counts them; none for a model of text."""
    if vision is None:
        return {"skip_tokenizer_init": True}
    size = {"shortest_edge": vision.min_pixels, "longest_edge": vision.max_pixels}
    return {
        "skip_tokenizer_init": False,  # vLLM builds no processor of pictures without
        "mm_processor_kwargs": {"images_kwargs": {"size": size}},
        "limit_mm_per_prompt": {"image": max_model_len, "video": 0},  # a picture has a token at least
        "mm_encoder_tp_mode": "data",  # the tower stays whole on every rank, as the plan of a push has it
        "skip_mm_profiling": True,  # the memory of the KV cache is given: a batch of the largest pictures tells nothing
    }


def prompt_for(request: Request, decode: Callable[[EncodedImage], Image]) -> dict[str, Any]:
    """Tokens with one placeholder per picture, which vLLM expands itself, and behind them what a partial response has.

    vLLM takes tokens that were expanded before without a word, and expands them again.
    """
    prompt: dict[str, Any] = {"prompt_token_ids": [*request.prompt.token_ids, *request.sampled]}
    if request.prompt.images:
        prompt["multi_modal_data"] = {"image": [decode(image) for image in request.prompt.images]}
    return prompt


def refuse_prompts(prompts: Sequence[Prompt], max_prompt_length: int, sees: bool) -> None:
    """Raises ValueError for pictures where there is a model of text, and for prompts of too many tokens."""
    for prompt in prompts:
        if prompt.images and not sees:
            raise ValueError(
                f"prompt {prompt.uid} (row {prompt.row}) has {len(prompt.images)} pictures, but model.path is a text "
                "model: its config.json has no vision_config; set model.path to a vision-language model, or "
                "data.image_key='' to leave the pictures out"
            )
        if prompt.length > max_prompt_length:
            raise ValueError(
                f"prompt {prompt.uid} (row {prompt.row}) has {prompt.length} tokens, above "
                f"data.max_prompt_length={max_prompt_length}; filter or truncate it, or raise that"
            )


def refuse_other_tokens(request: Request, tokens: Sequence[int]) -> None:
    """Raises ValueError unless the engine reads the `tokens` that the policy will be trained on."""
    expected = [*request.prompt.expanded_ids, *request.sampled]
    if list(tokens) == expected:
        return
    pairs = enumerate(zip(tokens, expected, strict=False))
    first = next((place for place, (one, other) in pairs if one != other), min(len(tokens), len(expected)))
    raise ValueError(
        f"prompt {request.prompt.uid} (row {request.prompt.row}): the engine reads {len(tokens)} tokens and the policy "
        f"would be trained on {len(expected)}, which differ from token {first} on: they count the tokens of its "
        f"{len(request.prompt.images)} pictures differently; prepare data and engine with one data.max_pixels and one "
        "preprocessor_config.json"
    )
