"""A recipe for a large model on a few processes of a CPU, with a tiny model of its family.

Only places and sizes are others. The policy draws its tokens nearly evenly from 264, one of which is a right answer by
itself: about one response in seven has it, so that the recipe's own verifier and filter find groups to train on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from dapo_mcore.config import RunConfig
from dapo_mcore.train import load_config
from tests.e2e.torchrun import LIMIT_S, environment
from tests.recipes import Recipe, options
from tools.make_geometry import MESSAGES
from tools.plan import MODELS
from tools.tiny import perimeters, sight
from tools.tiny.model import SEEING, random_model, save_folder, tiny_config

ROOT = Path(__file__).resolve().parents[2]
FAKES = ROOT / "tests" / "npu" / "fakes"
ANSWER = 15
TRAINING, VALIDATION = 48, 2  # rows
SIZES: dict[str, Any] = {
    "model.dtype": "fp32",  # engine and policy agree to its rounding
    "data.max_prompt_length": 384,  # a token is a byte
    "data.max_response_length": 40,
    "data.train_batch_size": 4,
    "data.gen_batch_size": 12,
    "rollout.n": 8,
    "rollout.kv_cache_mb": 64,
    "reward.num_workers": 1,
    "actor.ppo_mini_batch_size": 1,
    "actor.ppo_max_token_len_per_gpu": 1024,
    "trainer.total_training_steps": 1,
}
DEGREES = (  # a recipe's that are above 1 become 2
    "actor.megatron.tensor_model_parallel_size",
    "actor.megatron.context_parallel_size",
    "actor.megatron.expert_model_parallel_size",
    "rollout.tensor_model_parallel_size",
)
PUNISHED = {"reward.overlong_buffer.len": 8}  # as in the recipes, a fifth of a response
STAGED = {  # a quarter of the recipe's responses, a stage each step
    "rollout.n": 4,
    "rollout.n_schedule": "[{until:0.25,value:8},{until:0.5,value:6}]",
    "trainer.total_training_steps": 3,
}
PLACES = ("model.path", "data.train.files", "data.val.files", "trainer.output_dir")
MATH_ROWS = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", MESSAGES),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
        ("extra_info", pa.struct([("index", pa.string())])),
    ]
)


@dataclass(frozen=True)
class Walk:
    result: subprocess.CompletedProcess[str]
    out: Path


def family_of(recipe: Recipe) -> str:
    return json.loads((MODELS / f"{recipe.model}.json").read_text())["model_type"]


def save_family(family: str, folder: Path) -> None:
    """folder/model, folder/train.parquet and folder/val.parquet."""
    save_model(family, folder / "model")
    if family in SEEING:
        write_geometry(folder)
    else:
        write_math(folder)


def save_model(family: str, folder: Path) -> None:
    processor = sight.build_processor()
    tokenizer: Any = getattr(processor, "tokenizer")  # noqa: B009 - not declared
    tokenizer.add_tokens([rf"\boxed{{{ANSWER}}}"])
    assert len(tokenizer) == sight.VOCAB_SIZE
    config = tiny_config(family)
    if family not in SEEING:
        config.update({"vocab_size": sight.VOCAB_SIZE, "max_position_embeddings": 1024})
        config.update({"eos_token_id": sight.token_id(sight.END), "pad_token_id": sight.token_id(sight.PAD)})
        tokenizer.chat_template = sight.TEMPLATE
    save_folder(random_model(config, seed=0), folder)
    (processor if family in SEEING else tokenizer).save_pretrained(folder)


def write_geometry(folder: Path) -> None:
    """With the columns of hiyouga/geometry3k."""
    every = [sides for sides in perimeters.problem_sets(0, 0, 0).warm_start if sum(sides) == ANSWER]
    for name, drawn in {"val": every[:VALIDATION], "train": every[VALIDATION : VALIDATION + TRAINING]}.items():
        perimeters.write(folder / f"{name}.parquet", drawn, Random(name))


def write_math(folder: Path) -> None:
    """With the columns of DAPO-Math-17k."""
    for name, count in {"val": VALIDATION, "train": TRAINING}.items():
        rows = [
            {
                "data_source": "math_dapo",
                "prompt": [{"role": "user", "content": f"For {name}, what is {ANSWER - i} + {i}?"}],
                "ability": "MATH",
                "reward_model": {"ground_truth": str(ANSWER), "style": "rule-lighteval/MATH_v2"},
                "extra_info": {"index": f"{name}-{i}"},
            }
            for i in range(count)
        ]
        parquet.write_table(pa.Table.from_pylist(rows, MATH_ROWS), folder / f"{name}.parquet")


def sizes(config: RunConfig) -> dict[str, Any]:
    """Options in which the run differs from the recipe, whose options are `config`."""
    found = options(config)
    degrees = {name: 2 for name in DEGREES if found[name] > 1}
    punished = PUNISHED if config.reward.overlong_buffer.enable else {}
    return SIZES | degrees | punished | (STAGED if config.rollout.n_schedule else {})


def overrides(recipe: Recipe, family: Path, out: Path) -> list[str]:
    files = (f"[{family / 'train.parquet'}]", f"[{family / 'val.parquet'}]")
    places = dict(zip(PLACES, (family / "model", *files, out), strict=True))
    chosen = places | sizes(load_config([f"experiment={recipe.name}"]))
    return [f"experiment={recipe.name}", *(f"{name}={value}" for name, value in chosen.items())]


def processes(config: RunConfig) -> int:
    """As few as hold the degrees; twice as many where gradients are summed during the backward pass, those of experts
    too."""
    megatron = config.actor.megatron
    sharing = 2 ** sum(size > 1 for size in (megatron.tensor_model_parallel_size, megatron.context_parallel_size))
    return max(2, sharing) * (2 if megatron.overlap_grad_reduce else 1)


def walk(recipe: Recipe, family: Path, out: Path) -> Walk:
    """As docs/recipes.md starts it."""
    fakes = [FAKES] if recipe.is_for_npus else []
    path = os.pathsep.join(map(str, (*fakes, ROOT, ROOT / "kernels")))
    variables = environment() | {"PYTHON": sys.executable, "PYTHONPATH": path}
    ranks = processes(load_config([f"experiment={recipe.name}"]))
    program = ["-m", "dapo_mcore.train", *overrides(recipe, family, out)]
    command = [str(ROOT / "launch" / "torchrun.sh"), str(ranks), *program]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=LIMIT_S)
    return Walk(result, out)
