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
# Twice as wide as the tiny model's, to tell digits; every block adds to a layer of the decoder.
TOWER = {"hidden_size": 64, "intermediate_size": 128, "deepstack_visual_indexes": [0, 1]}
ROPE_THETA = 1e4  # prompts and responses are short
EXPERT_WIDTH = 96
TEMPLATE = """\
{% for m in messages %}{% for part in m.content %}{% if part.type == 'image' %}\
<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}\
"""  # the picture and the question alone: nothing else to attend to
VALIDATION, TRAINING = 160, 160  # problems
PICTURES = 4  # of each problem to train on
REPORT_EVERY = 10  # steps


def policy_config() -> PretrainedConfig:
    config = tiny_config(FAMILY)
    config.vision_config.update(TOWER)
    config.text_config.moe_intermediate_size = EXPERT_WIDTH
    config.text_config.rope_parameters["rope_theta"] = ROPE_THETA
    return config


def make(out: Path, seed: int, warm: WarmStart, training: int = TRAINING) -> None:
    """`training` counts the problems left to the run."""
    problems = perimeters.problem_sets(seed, VALIDATION, training)
    model, processor = random_model(policy_config(), seed), build_processor()
    processor.chat_template = TEMPLATE
    total = warm.tower_steps + warm.steps

    def report(step: int, loss: float) -> None:
        if step % REPORT_EVERY == 0 or step == total:
            print(f"warm start {step}/{total} loss {loss:.4f}", flush=True)

    train(model, processor, problems.warm_start, warm, seed, report)
    save_folder(model, out)
    processor.save_pretrained(out)  # with its template
    perimeters.write(out / "val.parquet", problems.validation, Random("validation"))
    perimeters.write(out / "train.parquet", list(problems.training) * PICTURES, Random(f"training/{seed}"))
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
