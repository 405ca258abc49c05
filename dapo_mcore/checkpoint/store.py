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
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from dapo_mcore.checkpoint.manifest import CorruptCheckpoint, sync, verify_manifest, write_manifest
from dapo_mcore.rollout.leader import LeaderError, is_leader, lead

PARTIAL = ".partial"


class CheckpointNotWritten(RuntimeError):
    """A save failed; what was saved before is as it was."""


class Checkpointed(Protocol):
    """What is saved in shards by every rank."""

    def state(self, loading: bool) -> dict[str, Any]: ...

    def load_state(self, loaded: dict[str, Any]) -> None: ...


class CheckpointStore:
    """Saves, finds and loads the checkpoints in `folder`; the newest `keep` stay. Every method is collective."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, step: int, policy: Checkpointed, run_state: Mapping[str, Any]) -> Path:
        """Write step_<step>; an older one is removed only after this one is complete. `run_state` is rank 0's.

        Raises:
            CheckpointNotWritten: e.g. the disk is full; earlier checkpoints are untouched. On rank 0 with the cause.
        """
        final = self.folder / f"step_{step:06d}"
        partial = final.with_name(final.name + PARTIAL)
        try:
            lead(lambda: _fresh(partial / "policy"))
            dist_checkpointing.save(policy.state(loading=False), str(partial / "policy"))
            _barrier()
            lead(lambda: self._complete(partial, final, run_state))
        except (OSError, CheckpointException) as error:
            raise _not_written(final, error) from error
        return final

    def newest(self, report: Callable[[str], None]) -> Path | None:
        """The newest checkpoint, up to `latest`, whose files are all as they were written; those that are not are
        reported."""
        return lead(lambda: self._newest(report))

    def load(self, checkpoint: Path, policy: Checkpointed) -> dict[str, Any]:
        """Restore `policy` and return the run state that was saved beside it.

        Raises:
            CorruptCheckpoint: the folder is incomplete or altered; nothing of it was unpickled.
        """
        lead(lambda: verify_manifest(checkpoint))
        policy.load_state(dist_checkpointing.load(policy.state(loading=True), str(checkpoint / "policy")))
        return lead(lambda: json.loads((checkpoint / "run.json").read_text()))

    def _complete(self, partial: Path, final: Path, run_state: Mapping[str, Any]) -> None:
        (partial / "run.json").write_text(json.dumps(run_state))
        write_manifest(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
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

    def _newest(self, report: Callable[[str], None]) -> Path | None:
        present, _ = self._complete_folders()
        for folder in reversed(present):
            try:
                verify_manifest(folder)
            except CorruptCheckpoint as error:
                report(f"checkpoint skipped: {error}")
                continue
            return folder
        return None


def _not_written(final: Path, error: OSError | CheckpointException) -> Exception:
    """Megatron collects the failures of all ranks on rank 0; the other ranks only learn that there was one."""
    if not is_leader():
        return LeaderError(f"{final}: not written")
    causes = [str(error)] if isinstance(error, OSError) else [str(cause) for cause, _ in error.failures.values()]
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
