"""Makes a check: its commands one after the other, under one limit of time, and what came of them."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from launch.progress import StageFailed, run
from tools.acceptance.check import Check, Command, Here
from tools.figures import Figure, read_figures

ROOT = Path(__file__).resolve().parents[2]
LONGEST_NOTE = 200  # characters


class Verdict(Enum):
    HOLDS = "holds"
    MEASURED = "measured"  # there is no bar
    MISSED = "MISSED"  # a bar
    FAILED = "FAILED"
    TIMED_OUT = "TIMED OUT"
    NOT_HERE = "not here"

    @property
    def is_bad(self) -> bool:
        return self in (Verdict.MISSED, Verdict.FAILED, Verdict.TIMED_OUT)


@dataclass(frozen=True, slots=True)
class Result:
    check: Check
    commands: list[Command]
    verdict: Verdict
    figures: list[Figure]
    note: str = ""  # where figures do not say it
    seconds: float = 0.0


def make(check: Check, here: Here) -> Result:
    """What an earlier call has left in the check's folder goes."""
    if obstacle := check.obstacle(here):
        return Result(check, [], Verdict.NOT_HERE, [], obstacle)
    folder = here.out / check.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    commands, log, start = check.commands(here, folder), folder / "log.txt", time.monotonic()
    verdict, note = _carry_out(commands, log, here.platform, start + check.limit_s)
    figures = read_figures(log)
    if verdict is None:
        verdict = _judged(figures)
        note = "" if figures else f"states no figures, see {log}"
    return Result(check, commands, verdict, figures, note, time.monotonic() - start)


def _carry_out(commands: list[Command], log: Path, platform: str, deadline: float) -> tuple[Verdict | None, str]:
    """None: every command came to its end."""

    def on_tick() -> None:
        if time.monotonic() > deadline:
            raise TimeoutError

    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
    try:
        for command in commands:
            run(command, log=log, cwd=ROOT, env={"DAPO_PLATFORM": platform, "PYTHONPATH": path}, on_tick=on_tick)
    except TimeoutError:
        return Verdict.TIMED_OUT, f"see {log}"
    except StageFailed:
        return Verdict.FAILED, f"{_cause(log)} (see {log})"
    return None, ""


def _judged(figures: list[Figure]) -> Verdict:
    if not figures:
        return Verdict.FAILED
    if not all(figure.holds for figure in figures):
        return Verdict.MISSED
    return Verdict.HOLDS if any(figure.bar is not None for figure in figures) else Verdict.MEASURED


def _cause(log: Path) -> str:
    """The first line that calls itself an error, otherwise the last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = next((line for line in lines if line.startswith("error:")), lines[-1])
    return told[:LONGEST_NOTE]
