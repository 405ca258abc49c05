"""Pictures of a row: read, looked through, and counted against their marks in the text."""

from __future__ import annotations

import base64
import binascii
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from dapo_mcore.prompts.problem import Problem, RowFault
from dapo_mcore.types import EncodedImage

IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"
VIDEO_KEY = "videos"  # where verl's data sets hold them
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # PIL's readers of rarer ones raise anything
DAMAGED = (OSError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError)  # what PIL raises


@dataclass(frozen=True, slots=True)
class ImageColumn:
    """Where a row has its pictures, and how large one may be: data.image_key and data.max_pixels."""

    key: str  # empty: no pictures are read
    max_pixels: int

    def add(self, problem: Problem, row: Mapping[str, Any], folder: Path) -> Problem:
        """The problem with the pictures of its row, which no longer stand in its metadata.

        A row without the column is text, whatever that says. Files are looked for in `folder`.

        Raises:
            RowFault: a picture that cannot be read or is too large; more or fewer pictures than marks; a video.
        """
        if not self.key:
            return problem
        is_marked = VIDEO_MARK in problem.text
        if row.get(VIDEO_KEY) and (is_marked or self.key in row):
            raise RowFault(f"column {VIDEO_KEY} holds a video; only pictures are read: give its frames as pictures")
        if self.key not in row:
            return problem
        images = tuple(self._image(value, folder) for value in _as_list(row[self.key]))
        marks = problem.text.count(IMAGE_MARK)
        if marks != len(images):
            raise RowFault(
                f"{marks} times {IMAGE_MARK} in the prompt, but {len(images)} pictures in data.image_key={self.key}"
            )
        if images and is_marked:
            raise RowFault(f"{VIDEO_MARK} in the prompt; only pictures are read: give its frames as pictures")
        metadata = {name: value for name, value in problem.metadata.items() if name != self.key}
        return replace(problem, images=images, metadata=metadata)

    def _image(self, value: Any, folder: Path) -> EncodedImage:
        data = _encoded(value, folder)
        try:
            with Image.open(BytesIO(data), formats=FORMATS) as picture:
                width, height = picture.size
        except DAMAGED:
            raise RowFault(f"a picture that cannot be read: not one of {', '.join(FORMATS)}") from None
        if width * height > self.max_pixels:
            raise RowFault(
                f"a picture of {width} x {height} pixels is above data.max_pixels={self.max_pixels}; make it smaller, "
                "or raise the limit"
            )
        image = EncodedImage(data, width, height)
        try:
            image.decode()
        except DAMAGED:
            raise RowFault("a picture that breaks off or is damaged; write or download it again") from None
        return image


NO_IMAGES = ImageColumn(key="", max_pixels=0)


def _as_list(value: Any) -> list[Any]:
    """One picture may stand without a list around it."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _encoded(value: Any, folder: Path) -> bytes:
    """From bytes, a file's path, {bytes, path} as `datasets` stores it (in JSON the bytes are base64), or PIL."""
    if isinstance(value, Mapping) and (value.get("bytes") is not None or value.get("path") is not None):
        inside = value.get("bytes")
        return _encoded(value["path"], folder) if inside is None else _from_bytes(inside)
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return _from_file(value, folder)
    if isinstance(value, Image.Image):
        file = BytesIO()
        value.save(file, "PNG")
        return file.getvalue()
    raise RowFault(f"a picture is a {type(value).__name__}, not bytes, a path or {{bytes, path}}")


def _from_bytes(value: Any) -> bytes:
    try:
        return value if isinstance(value, bytes) else base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise RowFault("the bytes of a picture are neither bytes nor base64") from None


def _from_file(value: str, folder: Path) -> bytes:
    if "://" in value:
        raise RowFault("a picture is named by a URL, and none is downloaded; download it and give its path")
    try:
        return (folder / value).read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RowFault(
            f"picture {value!r:.200} cannot be read ({reason}); paths are relative to the data file"
        ) from None
