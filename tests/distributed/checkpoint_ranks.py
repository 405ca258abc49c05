"""What each rank does for test_checkpoint."""

from __future__ import annotations

import dapo_mcore.actor  # noqa: F401  adapts Megatron before its first import

# isort: split
import json
import shutil
from pathlib import Path
from typing import Any

from dapo_mcore.checkpoint.manifest import NAME
from dapo_mcore.checkpoint.store import CheckpointStore
from dapo_mcore.rollout.leader import is_leader, lead


class Steps:
    """A policy that is nothing but its step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def state(self, loading: bool) -> dict[str, Any]:
        return {"step": self.step}

    def load_state(self, loaded: dict[str, Any]) -> None:
        self.step = loaded["step"]


def found_after_damage(folder: Path) -> dict[str, Any]:
    """What this rank loads of an undamaged checkpoint, and for each file what it says when that is damaged."""
    store, policy, reports = CheckpointStore(folder, keep=1), Steps(0), list[str]()
    checkpoint = store.save(7, Steps(7), {"after": 7} if is_leader() else {})
    state = store.load(checkpoint, policy)
    said = {}
    for name in json.loads((checkpoint / NAME).read_text()):
        lead(lambda file=checkpoint / name: damage(file))
        reports.clear()
        newest = store.newest(reports.append)
        try:
            store.load(checkpoint, policy)
        except Exception as error:  # noqa: BLE001 - which of them is the question
            said[name] = newest, tuple(reports), f"{type(error).__name__}: {error}"
        lead(lambda file=checkpoint / name: repair(file))
    return {"newest": store.newest(reports.append), "step": policy.step, "state": state, "said": said}


def damage(file: Path) -> None:
    shutil.copy(file, file.parents[2] / "kept")
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)


def repair(file: Path) -> None:
    shutil.move(file.parents[2] / "kept", file)
