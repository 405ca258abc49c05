"""What a model's image processor makes of pictures, and the only one whose numbers are known to be the model's."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from dapo_mcore.types import EncodedImage, PixelsOf

if TYPE_CHECKING:
    from torch import Tensor

PROCESSOR = "Qwen2VLImageProcessor"  # its twin for PIL makes other pixels


def pixels_under(path: str, max_pixels: int) -> PixelsOf:
    """A picture's [patches, numbers] float32, as the processor in the model folder `path` makes them.

    `max_pixels` holds where the processor's own limit is higher. The folder is read with the first picture.
    """

    @cache
    def processor() -> Any:
        return load_image_processor(path)

    def pixels_of(image: EncodedImage) -> Tensor:
        smallest, largest = limits_of(processor(), max_pixels)
        size = {"shortest_edge": smallest, "longest_edge": largest}
        return processor()(image.decode(), size=size, return_tensors="pt")["pixel_values"]

    return pixels_of


def limits_of(processor: Any, max_pixels: int) -> tuple[int, int]:
    """Least and most pixels of a resized picture."""
    return processor.size["shortest_edge"], min(processor.size["longest_edge"], max_pixels)


def load_image_processor(path: str) -> Any:
    """Of the model folder `path`.

    Raises:
        ValueError: an unknown processor, or none.
    """
    from transformers import AutoImageProcessor  # seconds, for torchvision

    try:
        processor = AutoImageProcessor.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.path={path}: no image processor in it ({str(error).splitlines()[0]:.200}); copy "
            "preprocessor_config.json from the model"
        ) from None
    if type(processor).__name__ != PROCESSOR:
        raise ValueError(
            f"model.path={path}: image processor {type(processor).__name__}; known is {PROCESSOR}, which needs "
            "torchvision: copy preprocessor_config.json from the model"
        )
    return processor
