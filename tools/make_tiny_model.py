"""Makes a tiny model folder: tokenizer, random weights, and a supervised warm start by the Megatron actor.

    python -m tools.make_tiny_model OUT --seed 0                               one process
    launch/torchrun.sh 2 -m tools.make_tiny_model OUT --seed 0                 experts shared by two processes
    python -m tools.make_tiny_model OUT --rare                                 that hardly ever shows its work
    python -m tools.make_tiny_model OUT --family llama --tied --no-warm-start  random weights of another family
    python -m tools.make_tiny_model OUT --family qwen3_vl_moe --no-warm-start  that sees, with its processor

OUT/recipe.json says how the model came about; a folder whose recipe is the one asked for is left as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, when called as a file

from dapo_mcore.actor.actor import Actor, build_actor
from dapo_mcore.actor.parallel import destroy_model_parallel, init_model_parallel, init_process_group
from dapo_mcore.config import ActorConfig, Dtype, MegatronConfig, ModelConfig, OptimConfig
from dapo_mcore.prompts import load_tokenizer
from dapo_mcore.types import TrainBatch
from dapo_mcore.weights import save_hf
from tools.tiny import arithmetic
from tools.tiny.model import FAMILIES, SEEING, random_model, save_folder, tiny_config
from tools.tiny.warm_start import RARE, WarmStart, train

RECIPE = "recipe.json"
REPORT_EVERY = 10  # steps


def recipe_of(
    family: str, tied: bool, seed: int, warm: WarmStart | None, then: WarmStart | None = None
) -> dict[str, Any]:
    """Everything the model depends on, and the problems a run with it should use."""
    sets = {"validation": arithmetic.VALIDATION, "train": arithmetic.training_set(seed),
            "warm_start": arithmetic.warm_start_set(seed)}  # fmt: skip
    return {
        "family": family,
        "tied": tied,
        "seed": seed,
        "task": arithmetic.TASK,
        "task_options": arithmetic.OPTIONS,
        "problems": {name: asdict(problems) for name, problems in sets.items()},
        "warm_start": asdict(warm) if warm else None,
        **({"then": asdict(then)} if then else {}),
    }


def is_finished(out: Path, recipe: dict[str, Any]) -> bool:
    file = out / RECIPE
    return file.is_file() and json.loads(file.read_text()) == recipe


def actor_options(warm: WarmStart, world_size: int) -> ActorConfig:
    return ActorConfig(
        ppo_max_token_len_per_gpu=8192,
        optim=OptimConfig(
            lr=warm.lr, min_lr=warm.min_lr, lr_warmup_steps=warm.lr_warmup_steps, lr_decay_style="linear",
            weight_decay=warm.weight_decay, beta2=warm.beta2,
        ),
        megatron=MegatronConfig(expert_model_parallel_size=world_size),
    )  # fmt: skip


def warm_start(source: Path, out: Path, seed: int, warm: WarmStart) -> None:
    """Train the model of `source` and write it to `out`. Collective."""
    options = actor_options(warm, dist.get_world_size())
    init_model_parallel(options.megatron, seed)
    actor = build_actor(ModelConfig(path=str(source), dtype=Dtype.fp32), options, warm.steps)
    problems = arithmetic.unseen(
        arithmetic.warm_start_set(seed).draw(), arithmetic.VALIDATION.draw(), arithmetic.training_set(seed).draw()
    )

    def report(step: int, loss: float) -> None:
        if dist.get_rank() == 0 and (step % REPORT_EVERY == 0 or step == warm.steps):
            print(f"warm start {step}/{warm.steps} loss {loss:.4f}", flush=True)

    train(lambda batch: update(actor, batch), problems, load_tokenizer(str(source)), warm, seed, report)
    save_hf(actor.weights(), actor.hf_config, source, out)
    destroy_model_parallel()


def update(actor: Actor, batch: TrainBatch) -> float:
    metrics = actor.update(batch)
    actor.finish_step()
    return metrics["actor/mismatch_abs"].value


def make(out: Path, family: str, tied: bool, seed: int, warm: WarmStart | None, then: WarmStart | None = None) -> None:
    """Random weights, trained by the recipe `warm` and on by `then`. Collective."""
    recipes = [recipe for recipe in (warm, then) if recipe]
    leads = dist.get_rank() == 0
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folders = [Path(scratch)]  # every rank makes one, all use that of rank 0
        dist.broadcast_object_list(folders, src=0)
        stations = [*(folders[0] / str(number) for number in range(len(recipes))), out]
        if leads:
            save_folder(random_model(tiny_config(family, tied), seed), stations[0])
        dist.barrier()
        for recipe, (before, after) in zip(recipes, pairwise(stations), strict=True):
            warm_start(before, after, seed, recipe)
            dist.barrier()  # rank 0 writes `after`, and its folder is in use until the last is done
    if leads:
        (out / RECIPE).write_text(json.dumps(recipe_of(family, tied, seed, warm, then), indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="Makes a tiny model folder.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", choices=FAMILIES, default="qwen3_moe")
    parser.add_argument("--tied", action="store_true", help="one matrix for embedding and head")
    parser.add_argument("--no-warm-start", action="store_true", help="random weights")
    parser.add_argument("--steps", type=int, default=WarmStart().steps, help="of the warm start")
    parser.add_argument("--rare", action="store_true", help="go on until the work is hardly ever shown (ablation)")
    given = parser.parse_args()
    if given.rare and given.no_warm_start:
        parser.error("--rare goes on from a warm start: leave --no-warm-start out")
    if given.family in SEEING and not given.no_warm_start:
        parser.error(f"--family {given.family} has no warm start: add --no-warm-start")
    warm = None if given.no_warm_start else WarmStart(steps=given.steps)
    then = RARE if given.rare else None
    if is_finished(given.out, recipe_of(given.family, given.tied, given.seed, warm, then)):
        print(f"{given.out} is there already")
        return 0
    given.out.parent.mkdir(parents=True, exist_ok=True)
    init_process_group()
    make(given.out, given.family, given.tied, given.seed, warm, then)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
