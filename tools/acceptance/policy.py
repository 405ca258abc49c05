"""python -m tools.acceptance.policy FOLDER: a small random Qwen3-MoE whose sizes the kernels of accelerators take.

Heads and experts of quickstart's model are too narrow for some of them. A folder that holds one is left as it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import PretrainedConfig

from tools.tiny.model import random_model, save_folder, tiny_config

SIZES = {
    "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "intermediate_size": 512, "moe_intermediate_size": 128,
}  # fmt: skip


def config() -> PretrainedConfig:
    found = tiny_config("qwen3_moe")
    found.update(SIZES)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.acceptance.policy", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    if (folder / "model.safetensors").is_file():
        return
    save_folder(random_model(config(), seed=0), folder)


if __name__ == "__main__":
    main()
