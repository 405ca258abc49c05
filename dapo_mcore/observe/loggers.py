"""Where a step's metrics go: metrics.jsonl and TensorBoard always, wandb when asked for, one line for people."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dapo_mcore.config import RunConfig

Row = Mapping[str, float]
Sink = Callable[[int, Row], None]


def jsonl_sink(folder: Path, first_step: int) -> Sink:
    """metrics.jsonl, one object per step. Rows of steps from `first_step` on, left by a run that is resumed, go."""
    file = folder / "metrics.jsonl"
    kept = [line for line in _lines(file) if json.loads(line)["step"] < first_step]
    file.write_text("".join(line + "\n" for line in kept))

    def write(step: int, row: Row) -> None:
        values = {key: value if math.isfinite(value) else None for key, value in row.items()}
        with file.open("a") as out:
            out.write(json.dumps({"step": step, **values}) + "\n")

    return write


def _lines(file: Path) -> list[str]:
    """Complete lines: a killed run may have left half of one."""
    return [line for line in file.read_text().split("\n")[:-1] if line] if file.exists() else []


def tensorboard_sink(folder: Path, first_step: int) -> Sink:
    """Event files in folder/tensorboard; `first_step` on hides what a resumed run had written there before."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(step: int, row: Row) -> None:
        for key, value in row.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return write


def wandb_sink(config: RunConfig, options: dict[str, Any], first_step: int) -> Sink:
    """A run of wandb's. One that starts after step 0 continues the one whose id the output folder holds.

    wandb keeps the rows it has of a step: those that a resumed run writes again are the same, and validation alone,
    which may be of other weights, gets a run of its own.

    Raises:
        ValueError: wandb is not installed.
    """
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("trainer.wandb=True: wandb is not installed; pip install wandb, or set it to false") from None
    trainer = config.trainer
    file = Path(trainer.output_dir) / "wandb_id"
    continues = bool(first_step) and not trainer.val_only and file.exists()
    continued = {"id": file.read_text(), "resume": "allow"} if continues else {}
    named = {"project": trainer.project_name, "name": trainer.experiment_name, "dir": trainer.output_dir}
    run = wandb.init(**named, **continued, config=options)
    if not trainer.val_only:
        file.write_text(run.id)

    def write(step: int, row: Row) -> None:
        run.log(dict(row), step=step)

    return write


# label, metric, format: the columns of the progress line, each shown when the step has the metric
COLUMNS = (
    ("acc", "reward/accuracy", "{:.3f}"),
    ("val", "val/accuracy", "{:.3f}"),
    ("greedy", "val/accuracy_greedy", "{:.3f}"),
    ("loss", "actor/loss", "{:+.4f}"),
    ("entropy", "actor/entropy", "{:.3f}"),
    ("len", "rollout/response_length", "{:.1f}"),
    ("clip", "actor/clip_fraction_high", "{:.4f}"),
    ("pass", "rollout/pass_rate", "{:.2f}"),
    ("tok/s", "time/tokens_per_s", "{:.0f}"),
    ("s", "time/step_s", "{:.1f}"),
)


def console_sink(last_step: int, phases: Sequence[str]) -> Sink:
    """One line per step, its seconds split by phase at the end."""

    def write(step: int, row: Row) -> None:
        shown = [f"{label} {form.format(row[key])}" for label, key, form in COLUMNS if key in row]
        seconds = [f"{phase} {row[f'time/{phase}_s']:.1f}" for phase in phases if f"time/{phase}_s" in row]
        tail = f"  ({', '.join(seconds)})" if seconds else ""
        print(f"step {step:>{len(str(last_step))}}/{last_step}  {'  '.join(shown)}{tail}", flush=True)

    return write


def fan_out(sinks: Sequence[Sink]) -> Sink:
    def write(step: int, row: Row) -> None:
        for sink in sinks:
            sink(step, row)

    return write
