"""Checkpoints of a run: policy, optimizer, schedule and prompt position as one unit.

    checkpoints/step_000020/policy/        Megatron dist_checkpointing (torch_dist), any parallel layout reads it
                            run.json       what the leader knows: prompt position, step
                            manifest.json  SHA-256 of the other files, written last
    checkpoints/latest                     the name of the newest folder, moved after it is complete

A folder is written beside its final name and renamed when complete, so what carries the name can be loaded. Folders of
later steps than `latest` names are left of a run that was started anew, or again from an earlier checkpoint: no run
continues from them by itself, and they are removed before those of the present one.
"""

from __future__ import annotations

import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from dapo_mcore.checkpoint.manifest import (
    CorruptCheckpoint,
    Entry,
    files_of,
    hashed,
    sync,
    verify_manifest,
    write_manifest,
)
from dapo_mcore.rollout.leader import LeaderError, is_leader, lead
from dapo_mcore.rollout.ranks import Ranks, RolloutError

PARTIAL = ".partial"


class CheckpointNotWritten(RuntimeError):
    """A save failed; what was saved before is as it was."""


class Checkpointed(Protocol):
    """What is saved in shards by every rank."""

    def state(self, loading: bool) -> dict[str, Any]: ...

    def load_state(self, loaded: dict[str, Any]) -> None: ...


class CheckpointStore:
    """Saves, finds and loads the checkpoints in `folder`; the newest `keep` stay. Every method is collective.

    The ranks share out what is hashed: one alone takes minutes for hundreds of gigabytes, and all wait.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self._ranks = Ranks.world()

    def save(self, step: int, policy: Checkpointed, run_state: Mapping[str, Any]) -> Path:
        """Write step_<step>; an older one is removed only after this one is complete. `run_state` is rank 0's.

        Raises:
            CheckpointNotWritten: e.g. the disk is full; earlier checkpoints are untouched. On rank 0 with the cause.
        """
        final = self.folder / f"step_{step:06d}"
        beside = final.with_name(final.name + PARTIAL)
        try:
            lead(lambda: _fresh(beside / "policy"))
            dist_checkpointing.save(policy.state(loading=False), str(beside / "policy"))
            _barrier()
            known = self._hashed(beside)
            lead(lambda: self._complete(beside, final, run_state, known))
        except (OSError, CheckpointException, RolloutError) as error:
            raise _not_written(final, error) from error
        return final

    def newest(self, report: Callable[[str], None]) -> Path | None:
        """The newest checkpoint, up to `latest`, whose files are all as they were written; those that are not are
        reported."""
        for folder in lead(lambda: self._complete_folders()[0][::-1]):
            fault = self._fault(folder)
            if not fault:
                return folder
            if is_leader():
                report(f"checkpoint skipped: {fault}")
        return None

    def load(self, checkpoint: Path, policy: Checkpointed) -> dict[str, Any]:
        """Restore `policy` and return the run state that was saved beside it.

        Raises:
            CorruptCheckpoint: the folder is incomplete or altered; nothing of it was unpickled.
        """
        lead(partial(_refuse, self._fault(checkpoint)))
        policy.load_state(dist_checkpointing.load(policy.state(loading=True), str(checkpoint / "policy")))
        return lead(lambda: json.loads((checkpoint / "run.json").read_text()))

    def _hashed(self, folder: Path) -> dict[str, Entry]:
        """Of every file, each by one rank."""
        own = slice(self._ranks.rank, None, self._ranks.size)
        names = lead(lambda: files_of(folder))
        parts = self._ranks.all_gather(self._ranks.together(lambda: hashed(folder, names[own])))
        return {name: entry for part in parts for name, entry in part.items()}

    def _fault(self, folder: Path) -> str:
        """Why a checkpoint cannot be loaded, the same on every rank; empty if it can. Each looks at a part of it."""
        fault = ""
        try:
            verify_manifest(folder, slice(self._ranks.rank, None, self._ranks.size))
        except (CorruptCheckpoint, OSError) as error:
            fault = str(error)
        return next(filter(None, self._ranks.all_gather(fault)), "")

    def _complete(self, beside: Path, final: Path, run_state: Mapping[str, Any], known: Mapping[str, Entry]) -> None:
        (beside / "run.json").write_text(json.dumps(run_state))
        write_manifest(beside, known)
        if final.exists():
            shutil.rmtree(final)
        beside.rename(final)
        sync(self.folder)
        _replace(self.folder / "latest", final.name)
        present, abandoned = self._complete_folders()
        for old in (abandoned + present)[: -self.keep]:
            shutil.rmtree(old)

    def _complete_folders(self) -> tuple[list[Path], list[Path]]:
        """Those up to `latest`, and those of later steps; in the order of their steps."""
        folders = sorted(f for f in self.folder.glob("step_*") if not f.name.endswith(PARTIAL))
        latest = self.folder / "latest"
        count = bisect_right([f.name for f in folders], latest.read_text()) if latest.is_file() else len(folders)
        return folders[:count], folders[count:]


def _refuse(fault: str) -> None:
    if fault:
        raise CorruptCheckpoint(fault)


def _not_written(final: Path, error: OSError | CheckpointException | RolloutError) -> Exception:
    """Megatron collects the failures of all ranks on rank 0; the other ranks only learn that there was one."""
    if not is_leader():
        return LeaderError(f"{final}: not written")
    is_megatrons = isinstance(error, CheckpointException)
    causes = [str(cause) for cause, _ in error.failures.values()] if is_megatrons else [str(error)]
    return CheckpointNotWritten(
        f"{final}: could not be written ({'; '.join(causes)}); make room or mend the disk and start the same command "
        "again: earlier checkpoints are untouched"
    )


def _fresh(folder: Path) -> None:
    """An empty folder; whatever an interrupted save left under the partial name is removed."""
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)


def _replace(file: Path, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new one, never half of it."""
    beside = file.with_suffix(".new")
    beside.write_text(text)
    sync(beside)
    os.replace(beside, file)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
