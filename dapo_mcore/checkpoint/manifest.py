"""SHA-256 of every file of a checkpoint, written last and verified before anything in it is unpickled."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict

NAME = "manifest.json"
ALL = slice(None)


class Entry(TypedDict):
    """Of one file."""

    bytes: int
    sha256: str


class CorruptCheckpoint(ValueError):
    """A checkpoint folder is incomplete, or a file of it is not what was written."""


def write_manifest(folder: Path, known: Mapping[str, Entry] | None = None) -> None:
    """Hash every file below `folder` but the `known` ones; the manifest itself reaches the disk after all of them."""
    files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    entries = {name: (known or {}).get(name) or _entry(file) for name, file in files.items()}
    for file in files.values():
        sync(file)
    manifest = folder / NAME
    manifest.write_text(json.dumps(entries, indent=1))
    sync(manifest)
    sync(folder)


def files_of(folder: Path) -> list[str]:
    """Every file below `folder`, but for the manifest."""
    return sorted({str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} - {NAME})


def hashed(folder: Path, names: Iterable[str]) -> dict[str, Entry]:
    return {name: _entry(folder / name) for name in names}


def verify_manifest(folder: Path, part: slice = ALL) -> None:
    """Raises CorruptCheckpoint, naming the first file that is missing, unexpected or altered. Only the contents of
    `part` of the files are looked at.
    """
    manifest = folder / NAME
    if not manifest.is_file():
        raise CorruptCheckpoint(f"{folder}: no {NAME}, so it was never completed")
    try:
        entries = json.loads(manifest.read_text())
    except ValueError as error:
        raise CorruptCheckpoint(f"{manifest}: not JSON ({error})") from None
    for name in sorted(entries.keys() ^ files_of(folder)):
        raise CorruptCheckpoint(f"{folder / name}: {'missing' if name in entries else 'not part of the checkpoint'}")
    for name, entry in list(entries.items())[part]:
        if (folder / name).stat().st_size != entry["bytes"] or _digest(folder / name) != entry["sha256"]:
            raise CorruptCheckpoint(f"{folder / name}: differs from what was saved (SHA-256)")


def sync(path: Path) -> None:
    """Force a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _entry(file: Path) -> Entry:
    return {"bytes": file.stat().st_size, "sha256": _digest(file)}


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
