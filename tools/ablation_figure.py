"""The curves of an ablation: every metric against training steps and against sampled groups, mean and range of seeds.

python -m tools.ablation_figure outputs/ablation/ablation.json --out docs/ablation.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from numpy.typing import NDArray

Rows = list[dict[str, Any]]  # of one run's metrics.jsonl
PANELS = {
    "accuracy on held-out problems": "val/accuracy",
    "entropy, nats": "actor/entropy",
    "response length, tokens": "rollout/response_length",
    "useful groups, share of sampled": "rollout/pass_rate",
}
POINTS = 100  # of a curve


def read_rows(run: Path) -> Rows:
    """Of a run's metrics.jsonl, as far as it is written."""
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []


def curve(rows: Rows, metric: str, against_groups: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Places and values of the rows that hold the metric. Places are steps, or groups sampled up to the step's end."""
    groups = list(accumulate(row.get("sampler/groups_submitted") or 0 for row in rows))
    places = groups if against_groups else [row["step"] for row in rows]
    points = [(x, row[metric]) for x, row in zip(places, rows, strict=True) if row.get(metric) is not None]
    xs, ys = zip(*points, strict=True)
    return np.array(xs, dtype=float), np.array(ys, dtype=float)


def spread(runs: Sequence[Rows], metric: str, against_groups: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Places [POINTS] that all runs reach, and their values there [runs, POINTS], interpolated."""
    curves = [curve(rows, metric, against_groups) for rows in runs]
    first, last = max(xs[0] for xs, _ in curves), min(xs[-1] for xs, _ in curves)
    places = np.linspace(first, last, POINTS)
    return places, np.stack([np.interp(places, xs, ys) for xs, ys in curves])


def _panel(axes: Axes, arms: Mapping[str, Sequence[Rows]], metric: str, against_groups: bool) -> None:
    for number, (arm, runs) in enumerate(arms.items()):
        places, values = spread(runs, metric, against_groups)
        label = f"{'+ ' if number else ''}{arm.replace('_', ' ')}"
        axes.plot(places, values.mean(0), color=f"C{number}", label=label, linewidth=1.4)
        axes.fill_between(places, values.min(0), values.max(0), color=f"C{number}", alpha=0.12, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.set_xlabel("sampled groups" if against_groups else "training step", fontsize=9)


def draw(arms: Mapping[str, Sequence[Rows]], out: Path) -> None:
    """One column per metric; lines are means over seeds, bands reach from the lowest to the highest seed."""
    figure, grid = plt.subplots(2, len(PANELS), figsize=(4 * len(PANELS), 6.4), layout="constrained")
    for column, (title, metric) in enumerate(PANELS.items()):
        grid[0, column].set_title(title, fontsize=10)
        for row, against_groups in enumerate((False, True)):
            _panel(grid[row, column], arms, metric, against_groups)
    grid[0, 0].legend(fontsize=8, loc="lower right")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws an ablation again from the ablation.json it left.")
    parser.add_argument("ablation", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="a .png or .svg file")
    given = parser.parse_args()
    draw(json.loads(given.ablation.read_text())["rows"], given.out)
    print(given.out)


if __name__ == "__main__":
    main()
