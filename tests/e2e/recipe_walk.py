"""A recipe for a large model, with a tiny one of its family and on few processes: what changes, and the start.

Nothing changes but places and sizes. The policy draws its tokens nearly evenly from 264, one of which is a whole right
answer, so that about one response in seven is right and the recipe's own verifier and filter find mixed groups.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from dapo_mcore.config import RunConfig
from dapo_mcore.train import load_config
from tests.recipes import Recipe
from tools.make_geometry import MESSAGES
from tools.plan import MODELS
from tools.tiny import perimeters, sight
from tools.tiny.model import SEEING, random_model, save_folder, tiny_config

ROOT = Path(__file__).resolve().parents[2]
FAKES = ROOT / "tests" / "npu" / "fakes"
LIMIT_S = 900.0
PERIMETER = 15
ANSWER = rf"\boxed{{{PERIMETER}}}"
TRAIN, VAL = 48, 2  # rows
LONGEST = {"max_position_embeddings": 1024}
SIZES = {
    "data.max_prompt_length": 384,  # tokens are bytes
    "data.max_response_length": 40,
    "data.train_batch_size": 4,
    "data.gen_batch_size": 12,
    "actor.ppo_mini_batch_size": 1,
    "actor.ppo_max_token_len_per_gpu": 1024,
    "rollout.kv_cache_mb": 64,
    "reward.num_workers": 1,
}
MATH_ROWS = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", MESSAGES),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
        ("extra_info", pa.struct([("index", pa.string())])),
    ]
)


def family_of(recipe: Recipe) -> str:
    return json.loads((MODELS / f"{recipe.model}.json").read_text())["model_type"]


def save_model(family: str, folder: Path) -> None:
    """One more token than its tokenizer has by itself: a whole answer."""
    config = tiny_config(family)
    processor = sight.build_processor()
    tokenizer = processor.tokenizer
    tokenizer.add_tokens([ANSWER])
    if family not in SEEING:
        ends = {"eos_token_id": sight.token_id(sight.END), "pad_token_id": sight.token_id(sight.PAD)}
        for name, value in {"vocab_size": sight.VOCAB_SIZE, **LONGEST, **ends}.items():
            setattr(config, name, value)
        tokenizer.chat_template = sight.TEMPLATE
    save_folder(random_model(config, seed=0), folder)
    (processor if family in SEEING else tokenizer).save_pretrained(folder)


def save_rows(family: str, folder: Path) -> None:
    write = write_geometry if family in SEEING else write_math
    write(folder)


def write_geometry(folder: Path) -> None:
    drawn = [sides for sides in perimeters.problem_sets(0, 0, 0).warm_start if sum(sides) == PERIMETER]
    for name, part in {"train": drawn[VAL:][:TRAIN], "val": drawn[:VAL]}.items():
        perimeters.write(folder / f"{name}.parquet", part, Random(name))


def write_math(folder: Path) -> None:
    """With the columns of DAPO-Math-17k."""
    for name, count in {"train": TRAIN, "val": VAL}.items():
        rows = [
            {
                "data_source": "math_dapo",
                "prompt": [{"role": "user", "content": f"What is {i} + {PERIMETER - i}? ({name})"}],
                "ability": "MATH",
                "reward_model": {"ground_truth": str(PERIMETER), "style": "rule-lighteval/MATH_v2"},
                "extra_info": {"index": f"{name}{i}"},
            }
            for i in range(count)
        ]
        parquet.write_table(pa.Table.from_pylist(rows, MATH_ROWS), folder / f"{name}.parquet")


def resized(config: RunConfig) -> dict[str, Any]:
    """Options -> the values with which the recipe runs here: every layout degree above 1 is 2."""
    rollout, megatron, buffer = config.rollout, config.actor.megatron, config.reward.overlong_buffer
    degrees = {
        f"actor.megatron.{name}": getattr(megatron, name)
        for name in (field.name for field in fields(megatron))
        if name.endswith("_parallel_size")
    }
    degrees["rollout.tensor_model_parallel_size"] = rollout.tensor_model_parallel_size
    sizes = {name: 2 for name, degree in degrees.items() if degree > 1}
    groups = [f"{{until:{stage.until},value:{stage.value // 4}}}" for stage in rollout.n_schedule]
    sizes |= {"rollout.n_schedule": f"[{','.join(groups)}]"} if groups else {}
    sizes["rollout.n"] = rollout.n // 4 if groups else 8
    sizes |= {"reward.overlong_buffer.len": 8} if buffer.enable else {}
    return {
        **SIZES,
        **sizes,
        "model.dtype": "fp32",
        "trainer.total_training_steps": 1 + len(groups),
    }


def walk(recipe: Recipe, model: Path, rows: Path, out: Path) -> subprocess.CompletedProcess[str]:
    config = load_config([f"experiment={recipe.name}"])
    places = {
        "model.path": model,
        "data.train.files": f"[{rows / 'train.parquet'}]",
        "data.val.files": f"[{rows / 'val.parquet'}]",
        "trainer.output_dir": out,
    }
    options = [f"{name}={value}" for name, value in {**places, **resized(config)}.items()]
    program = ["-m", "dapo_mcore.train", f"experiment={recipe.name}", *options]
    path = os.pathsep.join([*([str(FAKES)] if "_npu" in recipe.name else []), str(ROOT), str(ROOT / "kernels")])
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PYTHONPATH": path}
    command = [str(ROOT / "launch" / "torchrun.sh"), str(recipe.devices // 4), *program]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=LIMIT_S)
