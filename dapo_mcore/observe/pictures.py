"""Pictures of prompts as files that a browser shows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from dapo_mcore.types import EncodedImage, Prompt

FOLDER = "pictures"
LONGEST_SIDE = 512  # pixels: larger ones are made smaller, to be looked at


@dataclass(frozen=True, slots=True)
class PictureFolder:
    """The folder `pictures` in `parent`. A file is named by what it shows, so that it is written once."""

    parent: Path

    def paths_of(self, prompt: Prompt) -> list[str]:
        """Of the prompt's pictures, relative to `parent`; those that are not there yet are written."""
        return [self._path_of(image) for image in prompt.images]

    def _path_of(self, image: EncodedImage) -> str:
        path = f"{FOLDER}/{hashlib.blake2b(image.data, digest_size=16).hexdigest()}.png"
        file = self.parent / path
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            picture = image.decode()
            picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            picture.save(file)
        return path
