"""SHA-256 of every file of a checkpoint, written last and verified before anything in it is unpickled."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

NAME = "manifest.json"


class CorruptCheckpoint(ValueError):
    """A checkpoint folder is incomplete, or a file of it is not what was written."""


def write_manifest(folder: Path) -> None:
    """Hash every file below `folder`; the manifest itself reaches the disk after all of them."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    entries = {str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": _digest(file)} for file in files}
    for file in files:
        sync(file)
    manifest = folder / NAME
    manifest.write_text(json.dumps(entries, indent=1))
    sync(manifest)
    sync(folder)


def verify_manifest(folder: Path) -> None:
    """Raises CorruptCheckpoint, naming the first file that is missing, unexpected or altered."""
    manifest = folder / NAME
    if not manifest.is_file():
        raise CorruptCheckpoint(f"{folder}: no {NAME}, so it was never completed")
    entries = json.loads(manifest.read_text())
    present = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} - {NAME}
    for name in sorted(present ^ entries.keys()):
        raise CorruptCheckpoint(f"{folder / name}: {'missing' if name in entries else 'not part of the checkpoint'}")
    for name, entry in entries.items():
        if (folder / name).stat().st_size != entry["bytes"] or _digest(folder / name) != entry["sha256"]:
            raise CorruptCheckpoint(f"{folder / name}: differs from what was saved (SHA-256)")


def sync(path: Path) -> None:
    """Force a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
