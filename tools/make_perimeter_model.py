"""Makes the policy of `make quickstart-vl`: a tiny Qwen3-VL-MoE that reads lengths in pictures, and problems for it.

    python -m tools.make_perimeter_model OUT --seed 0

OUT holds the model, train.parquet and val.parquet (problems that its warm start left out) and, in recipe.json, how it
came about. One process; OMP_NUM_THREADS says how many cores it takes.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from random import Random

from transformers import PretrainedConfig

from tools.tiny import perimeters
from tools.tiny.model import random_model, save_folder, tiny_config
from tools.tiny.sight import build_processor
from tools.tiny.sighted_warm_start import WarmStart, train

FAMILY = "qwen3_vl_moe"
TOWER = {"hidden_size": 64, "intermediate_size": 128}  # twice as wide as the tiny model's, to tell digits
ROPE_THETA = 100.0  # prompt and response have 80 tokens: positions next to each other are far apart
VALIDATION, TRAINING = 256, 2_000  # problems
REPORT_EVERY = 10  # steps


def policy_config() -> PretrainedConfig:
    config = tiny_config(FAMILY)
    config.vision_config.update(TOWER)
    config.text_config.rope_parameters["rope_theta"] = ROPE_THETA
    return config


def make(out: Path, seed: int, warm: WarmStart, training: int = TRAINING) -> None:
    """`training` counts the problems left to the run."""
    problems = perimeters.problem_sets(seed, VALIDATION, training)
    model = random_model(policy_config(), seed)
    total = warm.tower_steps + warm.reading_steps + warm.steps

    def report(step: int, loss: float) -> None:
        if step % REPORT_EVERY == 0 or step == total:
            print(f"warm start {step}/{total} loss {loss:.4f}", flush=True)

    train(model, build_processor(), problems.warm_start, warm, seed, report)
    save_folder(model, out)
    perimeters.write(out / "val.parquet", problems.validation, Random("validation"))
    perimeters.write(out / "train.parquet", problems.training, Random(f"training/{seed}"))
    (out / "recipe.json").write_text(json.dumps({"seed": seed, "warm_start": asdict(warm)}, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="Makes a tiny model that reads lengths in pictures, and problems.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=WarmStart().steps, help="of learning to answer")
    given = parser.parse_args()
    make(given.out, given.seed, WarmStart(steps=given.steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
