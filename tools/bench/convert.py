"""Conversion of weights against `cp` of the same bytes on the same disk, and the memory it takes.

    python -m tools.bench convert                   4 layers of Qwen3-30B-A3B at full width, random: 6 GB, twice
    python -m tools.bench convert --vision          as many of Qwen3-VL-30B-A3B, and its vision tower
    python -m tools.bench convert --model FOLDER    another model

Every contender forces its files to the disk, conversions hash them besides. They take turns; the source is in the page
cache as far as memory reaches. Room for twice the model is needed in --out.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, Qwen3MoeConfig, Qwen3VLMoeConfig

from dapo_mcore.checkpoint.manifest import sync
from dapo_mcore.weights.conversion import Sizes, hf_to_mcore, mcore_to_hf
from dapo_mcore.weights.conversion.hf_files import index_of, targets, tensor_files
from dapo_mcore.weights.names import parameters
from tools.figures import Figure, as_json

BAR = 0.5  # of the speed of cp
NOISE_BYTES = 32 << 20


@dataclass
class Row:
    name: str
    run: Callable[[Path], None]  # to a folder that does not exist yet
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)  # of all threads and children: a busy host does not show


def wide_config(layers: int, vision: bool = False) -> PretrainedConfig:
    """Qwen3-30B-A3B or Qwen3-VL-30B-A3B, cut short."""
    sizes: dict[str, Any] = {
        "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": layers,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True, "tie_word_embeddings": False,
    }  # fmt: skip
    if vision:  # of the tower transformers' defaults are the published sizes, but for the width of the decoder
        tower = {"out_hidden_size": sizes["hidden_size"], "deepstack_visual_indexes": [8, 16, 24]}
        return Qwen3VLMoeConfig(
            text_config=sizes, vision_config=tower, tie_word_embeddings=sizes["tie_word_embeddings"], dtype="bfloat16"
        )
    return Qwen3MoeConfig(**sizes, dtype="bfloat16")


def write_random(folder: Path, config: PretrainedConfig) -> None:
    """A model folder of random finite bf16 weights, in little memory."""
    config.save_pretrained(folder)
    noise = np.random.default_rng(0).integers(0, 0x7F80, size=NOISE_BYTES // 2, dtype=np.int16).tobytes()
    rows = (parameter for parameter in parameters(config) if not parameter.row.twin)
    files = tensor_files([target for parameter in rows for target in targets(parameter, torch.bfloat16)])
    for file in files:
        with (folder / file.name).open("wb") as out:
            out.write(file.header)
            for number, target in enumerate(file.targets):
                left, start = target.nbytes, 2 * 7919 * number % NOISE_BYTES  # no two tensors alike
                while left:
                    left -= out.write(memoryview(noise)[start : start + left])
                    start = 0
    for name, text in index_of(files).items():
        (folder / name).write_text(text)


def copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", source, target], check=True)
    for file in target.iterdir():
        sync(file)


def told(sizes: Sizes) -> str:
    return " ".join(f"{name}={size}" for name, size in asdict(sizes).items() if size > 1) or "one rank"


def quiet(total: int) -> Callable[[int], None]:
    return lambda count: None


def measure(rows: Sequence[Row], out: Path, repeats: int) -> None:
    for _ in range(repeats):
        for row in rows:
            target = out / "measured"
            before, start = cpu_seconds(), time.perf_counter()
            row.run(target)
            row.seconds.append(time.perf_counter() - start)
            row.cpu_seconds.append(cpu_seconds() - before)
            shutil.rmtree(target)


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def report(rows: Sequence[Row], size: int) -> str:
    floor = statistics.median(rows[0].seconds)
    lines = [f"{'':<34}{'s':>8}{'CPU s':>8}{'GB/s':>8}{'of cp':>8}"]
    for row in rows:
        seconds, cpu = statistics.median(row.seconds), statistics.median(row.cpu_seconds)
        lines.append(f"{row.name:<34}{seconds:>8.1f}{cpu:>8.1f}{size / seconds / 1e9:>8.2f}{floor / seconds:>7.2f}x")
    return "\n".join(lines)


def figures(rows: Sequence[Row]) -> list[Figure]:
    """Of the conversions, which come after cp."""
    floor = statistics.median(rows[0].seconds)
    return [
        Figure(row.name, floor / statistics.median(row.seconds), "of cp's speed", BAR, at_least=True)
        for row in rows[1:]
    ]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="Hugging Face folder; default: made of random weights")
    parser.add_argument("--vision", action="store_true", help="a random model that sees")
    parser.add_argument("--layers", type=int, default=4, help="of the random model")
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder on the disk to be measured")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--json", action="store_true", help="end with the speeds as a line of JSON")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.out) as folder:
        out = Path(folder)
        if not given.model:
            write_random(out / "model", wide_config(given.layers, given.vision))
        model: Path = given.model or out / "model"
        wide = Sizes(tp=4, pp=2, ep=8) if not given.model else Sizes(tp=2)
        rows = [Row("cp -r", partial(copy, model))]
        convert = partial(hf_to_mcore, dtype=None, workers=given.workers, progress=quiet)
        rows += [Row(f"hf-to-mcore {told(sizes)}", partial(convert, model, sizes=sizes)) for sizes in (Sizes(), wide)]
        convert(model, out / "mcore", sizes=wide)
        back = partial(mcore_to_hf, config=model, workers=given.workers, progress=quiet)
        rows.append(Row(f"mcore-to-hf {told(wide)}", partial(back, out / "mcore")))
        measure(rows, out, given.repeats)
        size = sum(file.stat().st_size for file in model.iterdir())
    print(f"{size / 1e9:.1f} GB, {given.workers} workers, {os.cpu_count()} cores, median of {given.repeats}")
    print(report(rows, size))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"the bar is {BAR}x of cp; peak resident memory of this process, mapped pages included: {peak:.2f} GB")
    if given.json:
        print(as_json(figures(rows)))
