"""A stream of Hugging Face tensors into a folder that transformers and vLLM load."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dapo_mcore.weights.hf_folder import INDEX, SINGLE, HFFolder, check_folder

COMPANIONS = (  # what else makes a model folder: configs, tokenizer, processor
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "chat_template.*", "*processor_config.json", "LICENSE*",
)  # fmt: skip


def save_hf(
    weights: Iterable[tuple[str, Tensor]],
    hf_config: Any,
    source: str | Path,
    out: str | Path,
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Write `weights` (see `hf_weights`) to `out`, with the config and tokenizer files of the folder `source`.

    Collective: all ranks run through `weights`, rank 0 writes, and holds one file's tensors in host memory. The folder
    is written beside its place, checked for exactly the tensors of `hf_config`, then renamed: it appears whole or not
    at all, and replaces one of the same name. Raises OSError or ValueError on every rank if rank 0 fails.
    """
    stream = iter(weights)
    failure: Exception | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            _write(stream, hf_config, Path(source), Path(out), max_shard_bytes)
        except (OSError, ValueError, SafetensorError) as error:
            failure = error if isinstance(error, OSError | ValueError) else OSError(f"{out}: {error}")
    for _ in stream:  # the other ranks, and rank 0 after a failure, keep the collectives of `weights` in step
        pass
    if dist.is_initialized():
        answer: list[Exception | None] = [failure]
        dist.broadcast_object_list(answer, src=0)
        (failure,) = answer
    if failure is not None:
        raise failure


def _write(stream: Iterator[tuple[str, Tensor]], hf_config: Any, source: Path, out: Path, max_shard_bytes: int) -> None:
    partial, replaced = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.replaced")
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        dtype = _write_shards(stream, partial, max_shard_bytes)
        copy_companions(source, partial, dtype)
        check_folder(HFFolder(partial), hf_config)
    except (OSError, ValueError, SafetensorError):
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if out.exists():
        os.rename(out, replaced)
    os.rename(partial, out)
    shutil.rmtree(replaced, ignore_errors=True)


def _write_shards(stream: Iterator[tuple[str, Tensor]], folder: Path, max_shard_bytes: int) -> torch.dtype:
    """One file, or several with an index; returns the dtype of the first tensor."""
    files: list[list[str]] = []  # names of the tensors in each file
    total = 0
    dtype = torch.float32
    for shard in _shards(stream, max_shard_bytes):
        dtype = dtype if files else next(iter(shard.values())).dtype
        file = folder / f"{len(files)}.safetensors"
        save_file(shard, file, metadata={"format": "pt"})
        file.chmod(folder.stat().st_mode & 0o666)  # safetensors leaves it to its owner alone; the folder has the umask
        files.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(files) == 1:
        os.rename(folder / "0.safetensors", folder / SINGLE)
        return dtype
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        os.rename(folder / f"{number}.safetensors", folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
    return dtype


def _shards(stream: Iterator[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Copies on the host, in files of at most `max_bytes`; a tensor that is larger has a file of its own."""
    shard: dict[str, Tensor] = {}
    size, seen = 0, set[str]()
    for name, tensor in stream:
        if name in seen:
            raise ValueError(f"{name}: written twice")
        seen.add(name)
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
        size += tensor.nbytes
    if shard:
        yield shard


def copy_companions(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Config, tokenizer and the like; the config states `dtype`. ValueError if `source` has no config.json."""
    for path in sorted({path for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()}):
        shutil.copy2(path, folder / path.name)
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"{source}: no config.json to go with the exported weights")
    stated = _with_dtype(json.loads(config.read_text()), str(dtype).removeprefix("torch."))
    config.write_text(json.dumps(stated, indent=2) + "\n")


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config with the exported dtype wherever it states one: loaders follow it."""
    return {
        key: _with_dtype(value, dtype)
        if isinstance(value, dict)
        else dtype
        if key in ("dtype", "torch_dtype")
        else value
        for key, value in config.items()
    }
