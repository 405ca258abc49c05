"""What a model on disk consists of, as lines to read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from dapo_mcore.weights.conversion.convert import checkpoint_folder
from dapo_mcore.weights.conversion.hf_source import DTYPES
from dapo_mcore.weights.conversion.mcore_source import chunks_of, weights_of
from dapo_mcore.weights.conversion.torch_dist import read_index
from dapo_mcore.weights.hf_folder import HFFolder


def listing(path: Path) -> Iterator[str]:
    """A line per tensor (name, type, shape, size, parts and files) and one for the whole."""
    checkpoint = checkpoint_folder(path)
    yield from _mcore(checkpoint) if checkpoint else _hf(path)


def _hf(path: Path) -> Iterator[str]:
    folder = HFFolder(path)
    total = 0
    for name, shape in folder.shapes.items():
        dtype = DTYPES.get(folder.dtypes[name])
        size = math.prod(shape) * (dtype.itemsize if dtype else 0)
        total += size
        yield f"{name}  {folder.dtypes[name]}  {list(shape)}  {_bytes(size)}"
    yield f"Hugging Face folder: {len(folder.shapes)} tensors, {_bytes(total)}"


def _mcore(path: Path) -> Iterator[str]:
    index = read_index(path)
    weights, total, files = weights_of(index), 0, set[str]()
    places = set[tuple[str, int]]()  # a tensor may be listed under several keys
    for key, entry in weights.items():
        chunks = list(chunks_of(index, key))
        dtype, size = entry.properties.dtype, math.prod(entry.size) * entry.properties.dtype.itemsize
        is_new = (chunks[0].file, chunks[0].start) not in places
        places.add((chunks[0].file, chunks[0].start))
        total += size * is_new
        held = {chunk.file for chunk in chunks}
        files |= held
        told = f"{len(chunks)} chunks of {list(chunks[0].sizes)} in {len(held)} files" if is_new else "an alias"
        yield f"{key}  {str(dtype).removeprefix('torch.')}  {list(entry.size)}  {_bytes(size)}  {told}"
    ranks = {file.removeprefix("__").partition("_")[0] for file in files}
    beside = len(index.state_dict_metadata) - len(weights)
    yield (f"distributed checkpoint of Megatron, written for {len(ranks)} ranks: {len(weights)} keys, {_bytes(total)} "
           f"in {len(files)} files; {beside} entries beside the weights")  # fmt: skip


def _bytes(count: int) -> str:
    return f"{count / 1e9:.3f} GB" if count >= 1e8 else f"{count:,} B"
