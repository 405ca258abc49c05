"""The tokenizer of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """From the folder alone: nothing is downloaded, and no code of the folder is run.

    Raises:
        ValueError: no tokenizer in the folder, or its files are damaged.
    """
    folder = Path(path)
    present = [folder / name for name in NAMES if (folder / name).is_file()]
    if not present:
        raise ValueError(
            f"model.path={path}: no tokenizer there (looked for {', '.join(NAMES)}); copy the tokenizer's files from "
            "the model they belong to"
        )
    for file in (*present, folder / "tokenizer_config.json"):
        if file.suffix == ".json" and file.is_file():
            _check_json(file)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"model.path={path}: the tokenizer does not load ({error}); download or export the model again"
        ) from error


def _check_json(file: Path) -> None:
    """Damaged files raise a bare Exception inside the tokenizers library."""
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); download or export the model again") from error
