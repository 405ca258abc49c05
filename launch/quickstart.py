"""`make quickstart` and `make quickstart-vl`: install, make the small model, train it, and say what came of it.

Standard library only: it starts before anything is installed. What the children print goes to log files.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from launch.install import ROOT, check_disk, install
from launch.progress import Stage, StageFailed, run
from launch.recipes import RECIPES, TEXT, Recipe

PROCESSES = 2
RUN_GB = 1.0
WARM_START_LINE = re.compile(r"warm start (\d+)/(\d+) loss ([\d.]+)")


@dataclass(frozen=True)
class Folders:
    """Where a run with one seed leaves what it makes."""

    run: Path

    @classmethod
    def of(cls, recipe: Recipe, seed: int) -> Folders:
        return cls(ROOT / "outputs" / (recipe.name if seed == 0 else f"{recipe.name}-seed{seed}"))

    @property
    def model(self) -> Path:
        return self.run / "model"

    @property
    def exported(self) -> Path:
        return self.run / "hf_model"

    @property
    def metrics(self) -> Path:
        return self.run / "metrics.jsonl"

    def log(self, name: str) -> Path:
        return self.run / "logs" / f"{name}.log"


def quickstart(recipe: Recipe, seed: int) -> None:
    folders = Folders.of(recipe, seed)
    install()
    check_disk(ROOT, RUN_GB)
    total = recipe.total_steps()
    move_finished_run(folders)
    make_model(recipe, folders, seed)
    train(recipe, folders, seed, total)
    report(folders)


def move_finished_run(folders: Folders) -> None:
    """A finished run makes way for a new one and is kept; an interrupted one is continued."""
    if not folders.exported.exists():  # written last
        return
    number = next(n for n in range(1, sys.maxsize) if not folders.run.with_name(f"{folders.run.name}.{n}").exists())
    kept = folders.run.rename(folders.run.with_name(f"{folders.run.name}.{number}"))
    folders.run.mkdir()
    (kept / "model").rename(folders.model)
    print(f"the previous run is kept in {kept.relative_to(ROOT)}")


def make_model(recipe: Recipe, folders: Folders, seed: int) -> None:
    stamp = folders.model / "made_by.sha256"
    if stamp.exists() and stamp.read_text() == recipe.fingerprint(seed):
        print(f"{'warm start':<12} {folders.model.relative_to(ROOT)} is up to date")
        return
    stage = Stage("warm start", note="starting")

    def on_line(line: str) -> None:
        if found := WARM_START_LINE.match(line):
            stage.update(int(found[1]), int(found[2]), f"step {found[1]} of {found[2]}, loss {found[3]}")

    arguments = ["-m", recipe.maker, str(folders.model), f"--seed={seed}"]
    launch(recipe.processes, arguments, folders.log("warm_start"), on_line=on_line, on_tick=stage.update)
    stamp.write_text(recipe.fingerprint(seed))
    stage.close(recipe.policy)


def train(recipe: Recipe, folders: Folders, seed: int, total: int) -> None:
    stage = Stage("train", total=total, note="starting two processes, validating")

    def on_tick() -> None:
        rows = list(read_metrics(folders.metrics))
        if rows:
            stage.update(rows[-1]["step"], note=describe(rows, total))
        else:
            stage.update()

    launch(PROCESSES, training_arguments(recipe, folders, seed), folders.log("train"), on_tick=on_tick)
    stage.close(f"{total} steps of DAPO")


def training_arguments(recipe: Recipe, folders: Folders, seed: int) -> list[str]:
    """The run of the recipe's experiment, on the problems that the warm start left out."""
    options = {
        "model.path": folders.model,
        "trainer.output_dir": folders.run,
        "trainer.seed": seed,
        **recipe.problems(folders.model),
    }
    experiment = f"experiment={recipe.name}"
    return ["-m", "dapo_mcore.train", experiment, *(f"{name}={value}" for name, value in options.items())]


def launch(processes: int, arguments: list[str], log: Path, **callbacks: Any) -> None:
    run([str(ROOT / "launch" / "torchrun.sh"), str(processes), *arguments], log=log, cwd=ROOT, **callbacks)


def read_metrics(file: Path) -> Iterator[dict[str, Any]]:
    """Rows of metrics.jsonl; a last line that is still being written is left out."""
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return (json.loads(line) for line in lines if line)


def validations(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row.get("val/accuracy") is not None]


def describe(rows: list[dict[str, Any]], total: int) -> str:
    parts = [f"step {rows[-1]['step']} of {total}"]
    if (accuracy := rows[-1].get("reward/accuracy")) is not None:
        parts.append(f"training accuracy {accuracy:.0%}")
    if measured := validations(rows):
        parts.append("validation " + " → ".join(f"{row['val/accuracy']:.0%}" for row in measured))
    return ", ".join(parts)


def report(folders: Folders) -> None:
    measured = validations(list(read_metrics(folders.metrics)))
    if len(measured) < 2:
        raise StageFailed(f"{folders.metrics}: too few validations to compare; see {folders.log('train')}")
    before, after = measured[0], measured[-1]
    where = folders.run.relative_to(ROOT)
    print("\nvalidation accuracy on problems neither warm start nor training saw")
    print(f"{'':<16}{'sampled':>9}{'greedy':>9}")
    for label, row in (("before", before), (f"after {after['step']} steps", after)):
        print(f"{label:<16}{row['val/accuracy']:>9.1%}{row['val/accuracy_greedy']:>9.1%}")
    print(f"""
{where}/metrics.jsonl   one line per step; TensorBoard: .venv/bin/tensorboard --logdir {where}
{where}/rollouts        sampled responses, to read
{where}/hf_model        the trained policy, for transformers and vLLM
{where}/logs            what the processes printed""")


def interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description="Trains a small mixture-of-experts policy with DAPO on two CPU cores.")
    parser.add_argument("--recipe", choices=RECIPES, default=TEXT.name)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a background job would ignore the first
        signal.signal(number, interrupt)  # so that the children end, too
    try:
        quickstart(RECIPES[given.recipe], given.seed)
    except KeyboardInterrupt:
        print("\nquickstart: interrupted; the same command continues", file=sys.stderr)
        return 130
    except (StageFailed, ValueError, OSError) as error:
        print(f"\nquickstart: {error}\nmend the cause and run it again: what is done is kept", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
