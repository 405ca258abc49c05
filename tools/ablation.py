"""Runs the ablation of DAPO's techniques on the quickstart task, and draws the curves with their spread.

    python -m tools.ablation --seeds 0 1 2 --out outputs/ablation

Six arms (configs/experiment/ablation), each with the technique of its name added to the arm before; the last is DAPO.
For every seed one model is made, from which all arms start. The same command continues what was interrupted and
skips what is finished.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, when called as a file

from dapo_mcore.train import load_config
from tools.ablation_figure import draw, read_rows
from tools.tiny import arithmetic

ROOT = Path(__file__).resolve().parent.parent
ARMS = ("naive_grpo", "overlong_filtering", "clip_higher", "soft_overlong", "token_level_loss", "dynamic_sampling")


@dataclass(frozen=True, slots=True)
class Run:
    """One arm with one seed."""

    arm: str
    seed: int
    out: Path  # of the ablation

    @property
    def folder(self) -> Path:
        return self.out / self.arm / f"seed{self.seed}"

    @property
    def model(self) -> Path:
        return self.out / "models" / f"seed{self.seed}"

    def is_finished(self, steps: int) -> bool:
        rows = read_rows(self.folder)
        return bool(rows) and rows[-1]["step"] >= steps

    def options(self) -> list[str]:
        return [
            f"experiment=ablation/{self.arm}",
            f"model.path={self.model}",
            f"trainer.output_dir={self.folder}",
            f"trainer.seed={self.seed}",
            f"data.train.seed={arithmetic.training_set(self.seed).seed}",
        ]


def launch(processes: int, module: str, arguments: Sequence[str], log: Path) -> None:
    """Raises subprocess.CalledProcessError when it fails; what it prints is in `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [str(ROOT / "launch" / "torchrun.sh"), str(processes), "-m", module, *arguments]
    with log.open("a") as file:
        subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=True)


def run_all(runs: Sequence[Run], processes: int, steps: int) -> None:
    for number, run in enumerate(runs, 1):
        label = f"[{number}/{len(runs)}] {run.arm}, seed {run.seed}"
        if run.is_finished(steps):
            print(f"{label}: finished before", flush=True)
            continue
        print(f"{label}: {run.folder}", flush=True)
        make = [str(run.model), f"--seed={run.seed}", "--rare"]
        launch(processes, "tools.make_tiny_model", make, run.out / "logs" / f"model_seed{run.seed}.log")
        options = [
            *run.options(),
            f"actor.megatron.expert_model_parallel_size={processes}",
            f"trainer.total_training_steps={steps}",
        ]
        launch(processes, "dapo_mcore.train", options, run.out / "logs" / f"{run.arm}_seed{run.seed}.log")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("outputs/ablation"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=0, help="training steps; 0: as the configuration says")
    parser.add_argument("--processes", type=int, default=2, help="share the experts: 1, 2, 4 or 8")
    given = parser.parse_args()
    out = given.out.resolve()
    runs = [Run(arm, seed, out) for seed in given.seeds for arm in given.arms]
    steps = given.steps or load_config(runs[0].options()).trainer.total_training_steps
    try:
        run_all(runs, given.processes, steps)
    except subprocess.CalledProcessError as error:
        print(f"ablation: {' '.join(error.cmd[3:6])} ... failed; its log is in {out / 'logs'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nablation: interrupted; the same command continues", file=sys.stderr)
        return 130
    curves = {arm: [read_rows(run.folder) for run in runs if run.arm == arm] for arm in given.arms}
    draw(curves, out / "ablation.png")
    (out / "ablation.json").write_text(json.dumps({"seeds": given.seeds, "steps": steps, "rows": curves}) + "\n")
    print(out / "ablation.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
