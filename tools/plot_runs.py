"""Draws what runs learned: validation accuracy, response length, entropy and pass rate against steps.

python -m tools.plot_runs outputs/quickstart outputs/quickstart-seed1 --out docs/quickstart.png
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

# title, metrics drawn into one panel (name, line style)
PANELS = (
    ("validation accuracy", (("val/accuracy", "-"), ("val/accuracy_greedy", "--"))),
    ("response length, tokens", (("rollout/response_length", "-"),)),
    ("entropy, nats", (("actor/entropy", "-"),)),
    ("groups that pass the filter", (("rollout/pass_rate", "-"),)),
)


def series(run: Path, metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows of metrics.jsonl that hold the metric."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    points = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
    return [step for step, _ in points], [value for _, value in points]


def draw(axes: Axes, title: str, metrics: Sequence[tuple[str, str]], runs: Sequence[Path]) -> None:
    for number, run in enumerate(runs):
        for metric, style in metrics:
            steps, values = series(run, metric)
            axes.plot(steps, values, style, color=f"C{number}", label=f"{run.name}, {metric}", linewidth=1.5)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def plot(runs: Sequence[Path], out: Path) -> None:
    columns = 2
    figure, grid = plt.subplots(math.ceil(len(PANELS) / columns), columns, figsize=(9, 5.6), layout="constrained")
    for axes, (title, metrics) in zip(grid.flat, PANELS, strict=True):
        draw(axes, title, metrics, runs)
    grid.flat[0].legend(fontsize=7, loc="lower right")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws what runs learned.")
    parser.add_argument("runs", nargs="+", type=Path, help="output folders with a metrics.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="a .png or .svg file")
    given = parser.parse_args()
    plot(given.runs, given.out)
    print(given.out)


if __name__ == "__main__":
    main()
