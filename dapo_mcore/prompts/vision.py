"""How many tokens a model's processor makes of a picture, and where they lie in a prompt. No pixels are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dapo_mcore.config_check import read_model_config
from dapo_mcore.prompts.images import IMAGE_MARK
from dapo_mcore.prompts.pixels import limits_of, load_image_processor
from dapo_mcore.prompts.problem import Problem
from dapo_mcore.types import EncodedImage, VisualSpan
from dapo_mcore.vision_check import sees

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACEHOLDER = "<|image_pad|>"  # of Qwen3-VL


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """A picture is resized to whole cells, keeping its shape as far as that goes, and each cell becomes a token."""

    placeholder: int  # token id
    cell: int  # pixels of a side: patch size times merge size
    min_pixels: int  # of a resized picture
    max_pixels: int

    def grid(self, image: EncodedImage) -> tuple[int, int]:
        """Rows and columns of cells.

        Raises:
            ValueError: the picture is more than 200 times as long as wide.
        """
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize  # seconds, for torchvision

        height, width = smart_resize(image.height, image.width, self.cell, self.min_pixels, self.max_pixels)
        return height // self.cell, width // self.cell

    def spans(self, problem: Problem, token_ids: Sequence[int]) -> tuple[VisualSpan, ...]:
        """Where the tokens of each picture lie once `token_ids`, with one placeholder for each, is expanded.

        Raises:
            ValueError: another number of placeholders than of pictures; a picture that is too long or too narrow.
        """
        places = [index for index, token in enumerate(token_ids) if token == self.placeholder]
        if len(places) != len(problem.images) or (not places and IMAGE_MARK in problem.text):
            raise ValueError(
                f"data.image_key: {problem.place} has {len(problem.images)} pictures, and its prompt "
                f"{problem.text.count(IMAGE_MARK)} times {IMAGE_MARK} and, as the model reads it, {len(places)} times "
                f"{PLACEHOLDER}; name the column of its pictures, mark each with {IMAGE_MARK} and use the model's chat "
                "template"
            )
        spans: list[VisualSpan] = []
        grown = 0  # tokens that the pictures before add
        for place, image in zip(places, problem.images, strict=True):
            spans.append(VisualSpan(place + grown, *self._grid_of(problem, image)))
            grown += spans[-1].num_tokens - 1
        return tuple(spans)

    def _grid_of(self, problem: Problem, image: EncodedImage) -> tuple[int, int]:
        try:
            return self.grid(image)
        except ValueError as error:
            raise ValueError(
                f"data.image_key: {problem.place} has a picture of {image.width} x {image.height} pixels, which the "
                f"model's processor refuses ({error}); crop it"
            ) from None


def load_image_tokens(path: str, tokenizer: PreTrainedTokenizerBase, max_pixels: int) -> ImageTokens | None:
    """As the processor in the model folder `path` counts, with `max_pixels` where its own limit is higher.

    None for a model that reads text alone.

    Raises:
        ValueError: a vision-language model with an unknown processor or none, or whose tokenizer is another's.
    """
    model = read_model_config(path)
    if not sees(model):
        return None
    processor = load_image_processor(path)
    smallest, largest = limits_of(processor, max_pixels)
    if max_pixels < smallest:
        raise ValueError(
            f"data.max_pixels={max_pixels}: below the {smallest} pixels to which the model's processor enlarges small "
            "pictures; raise it to that or more"
        )
    placeholder = _placeholder(path, tokenizer, model.get("image_token_id"))
    return ImageTokens(placeholder, processor.patch_size * processor.merge_size, smallest, largest)


def _placeholder(path: str, tokenizer: PreTrainedTokenizerBase, expected: int | None) -> int:
    token_id = tokenizer.convert_tokens_to_ids(PLACEHOLDER)
    if not isinstance(token_id, int) or token_id != expected:
        raise ValueError(
            f"model.path={path}: the tokenizer has {PLACEHOLDER} as token {token_id}, config.json says "
            f"image_token_id={expected}; take both from the same model"
        )
    return token_id


def refuse_pictures(problems: Sequence[Problem], name: str) -> None:
    """Raises ValueError when a problem has pictures: for models that read text alone."""
    shown = [problem.place for problem in problems if problem.images]
    if shown:
        raise ValueError(
            f"{name}: {len(shown)} of {len(problems)} rows have pictures (the first: {shown[0]}), but model.path is a "
            "text model: its config.json has no vision_config; set model.path to a vision-language model, or "
            "data.image_key='' to leave the pictures out"
        )
