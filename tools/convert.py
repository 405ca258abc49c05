"""Converts weights between Hugging Face folders and Megatron's distributed checkpoints, compares and lists them.

    python -m tools.convert hf-to-mcore models/qwen3-30b-a3b checkpoints/qwen3 --tp 4 --ep 8
    python -m tools.convert mcore-to-hf checkpoints/step_000100 exported --config models/qwen3-30b-a3b
    python -m tools.convert verify models/qwen3-30b-a3b exported
    python -m tools.convert inspect checkpoints/qwen3

What was interrupted continues with the same command; the result appears under its name when it is complete.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from dapo_mcore.checkpoint.manifest import NAME as MANIFEST
from dapo_mcore.checkpoint.manifest import verify_manifest
from dapo_mcore.weights import conversion
from dapo_mcore.weights.conversion.listing import listing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHOWN = 20  # differences that `verify` prints


class Speed(ProgressColumn):
    """10^9 units per second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed / 1e9:.2f} {self.unit}/s" if task.speed else "")


@contextmanager
def bar(label: str, unit: str = "GB") -> Iterator[Callable[[int], Callable[[int], None]]]:
    """A function that is told the total and returns one that is told the progress."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), Speed(unit),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns) as progress:

        def begin(total: int) -> Callable[[int], None]:
            task = progress.add_task(label, total=total)
            return lambda count: progress.advance(task, count)

        yield begin


def hf_to_mcore(given: argparse.Namespace) -> int:
    sizes = conversion.Sizes(given.tp, given.pp, given.vpp, given.ep, given.etp)
    with bar("hf-to-mcore") as progress:
        conversion.hf_to_mcore(given.src, given.dst, sizes, DTYPES.get(given.dtype), given.workers, progress)
    print(given.dst)
    return 0


def mcore_to_hf(given: argparse.Namespace) -> int:
    with bar("mcore-to-hf") as progress:
        conversion.mcore_to_hf(given.src, given.dst, given.config or given.src, given.workers, progress)
    print(given.dst)
    return 0


def verify(given: argparse.Namespace) -> int:
    folders = (given.a, given.b)
    for folder in folders:
        if (folder / MANIFEST).is_file():
            verify_manifest(folder)
    described = [given.config] if given.config else [f for f in folders if (f / "config.json").is_file()]
    if not described:
        raise ValueError(f"{given.a}, {given.b}: neither has a config.json; name a folder that has with --config")
    hf_config = conversion.read_config(described[0])
    first, second = (conversion.open_source(folder, hf_config) for folder in folders)
    count = 0
    with bar("verify", "G elements") as progress:
        for difference in conversion.differences(first, second, hf_config, progress):
            count += 1
            if count <= SHOWN:
                print(f"{difference.name}: {difference.what}")
    print(f"{count} tensors differ" if count else "all tensors are equal, bit for bit")
    return int(count > 0)


def inspect(given: argparse.Namespace) -> int:
    for line in listing(given.x):
        print(line)
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Callable[[argparse.Namespace], int], *paths: str, told: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=told, description=told)
        added.set_defaults(run=run)
        for path in paths:
            added.add_argument(path, type=Path)
        return added

    to_mcore = command("hf-to-mcore", hf_to_mcore, "src", "dst", told="Hugging Face folder to Megatron checkpoint")
    for size, told in (("tp", "tensor"), ("pp", "pipeline"), ("vpp", "virtual pipeline"), ("ep", "expert"),
                       ("etp", "expert tensor")):  # fmt: skip
        to_mcore.add_argument(f"--{size}", type=int, default=1, help=f"{told} parallel size it is laid out for")
    to_mcore.add_argument("--dtype", choices=DTYPES, help="convert to this type; default: as in the files")
    to_hf = command("mcore-to-hf", mcore_to_hf, "src", "dst", told="Megatron checkpoint to Hugging Face folder")
    compare = command("verify", verify, "a", "b", told="compare two models, of either format, bit by bit")
    for added in (to_hf, compare):
        added.add_argument("--config", type=Path, help="folder with config.json and tokenizer; default: the source")
    for added in (to_mcore, to_hf):
        added.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="files written at a time")
    command("inspect", inspect, "x", told="list the tensors of a model, of either format")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    try:
        return given.run(given)
    except (ValueError, OSError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nconvert: interrupted; the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
