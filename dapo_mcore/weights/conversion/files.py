"""Files written in parallel, kept across a kill, and shown under their folder's name only when all are complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Event, Lock
from typing import Any, TypeAlias

from dapo_mcore.checkpoint.manifest import Entry, sync, write_manifest

Buffers: TypeAlias = Iterator[memoryview]
Advance: TypeAlias = Callable[[int], None]  # told the bytes done since the last call

UNFINISHED = ".unfinished"


@dataclass(frozen=True, slots=True)
class Job:
    """A file to be written; `content` yields it from start to end."""

    name: str
    size: int
    content: Callable[[], Buffers]


class Unfinished:
    """A folder beside `target` that takes its name when it is complete.

    A run that was killed left the files it had completed, and a journal of them. They are kept if `identity`, which
    describes source and options, is the same; otherwise they are removed.
    """

    def __init__(self, target: Path, identity: Any) -> None:
        if target.exists():
            raise ValueError(f"{target}: exists already; remove it or choose another name")
        self.target = target
        self.folder = target.with_name(f".{target.name}{UNFINISHED}")
        self._journal = self.folder.with_name(self.folder.name + ".journal")
        self._lock, self._stop = Lock(), Event()
        self._done = self._resumed(json.dumps(identity, sort_keys=True))

    def _resumed(self, identity: str) -> dict[str, Entry]:
        """The files that an earlier run of the same conversion completed; the journal then holds no more than these."""
        lines = self._journal.read_text().splitlines() if self._journal.is_file() else []
        if lines[:1] != [identity] or not self.folder.is_dir():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            lines = [identity]
        whole = [line for line in lines if line.endswith("}")]  # a kill may have cut the last one
        self._journal.write_text("\n".join(whole) + "\n")
        entries = [json.loads(line) for line in whole[1:]]
        return {entry.pop("name"): entry for entry in entries}

    def write(self, jobs: Sequence[Job], workers: int, advance: Advance) -> None:
        """Write what is not there yet, several files at a time. Raises what the first job to fail raised."""
        left = []
        for job in jobs:
            if job.name in self._done and (self.folder / job.name).stat().st_size == job.size:
                advance(job.size)
            else:
                left.append(job)
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(self._write, job, advance) for job in left]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def finish(self) -> None:
        """Add the integrity manifest and let the folder appear under its name."""
        write_manifest(self.folder, self._done)
        os.rename(self.folder, self.target)
        sync(self.target.parent)
        self._journal.unlink()

    def _write(self, job: Job, advance: Advance) -> None:
        path = self.folder / job.name
        digest, written = sha256(), 0
        with path.open("wb", buffering=0) as file:
            for buffer in job.content():
                if self._stop.is_set():
                    return
                _write_all(file.fileno(), buffer)
                digest.update(buffer)
                written += len(buffer)
                advance(len(buffer))
            os.fsync(file.fileno())
        assert written == job.size, f"{job.name}: {written} bytes, planned {job.size}"
        entry: Entry = {"bytes": written, "sha256": digest.hexdigest()}
        with self._lock, self._journal.open("a") as journal:
            self._done[job.name] = entry
            journal.write(json.dumps({"name": job.name, **entry}) + "\n")
            journal.flush()
            os.fsync(journal.fileno())


def _write_all(descriptor: int, buffer: memoryview) -> None:
    while buffer:
        buffer = buffer[os.write(descriptor, buffer) :]
