"""Hugging Face folder to Megatron checkpoint and back, without a process group, an accelerator or much memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from dapo_mcore.weights.conversion.files import Advance, Buffers, Job, Unfinished
from dapo_mcore.weights.conversion.hf_files import Target, TensorFile, index_of, targets, tensor_files
from dapo_mcore.weights.conversion.hf_source import HFSource
from dapo_mcore.weights.conversion.mapped import MappedFile
from dapo_mcore.weights.conversion.mcore_source import McoreSource
from dapo_mcore.weights.conversion.plan import Chunk, ChunkFile, aligned, chunk_files, train_layout
from dapo_mcore.weights.conversion.slices import slices
from dapo_mcore.weights.conversion.torch_dist import INDEX, write_index
from dapo_mcore.weights.conversion.torch_record import frame
from dapo_mcore.weights.hf_folder import HFFolder, check_folder
from dapo_mcore.weights.layouts import rectangle
from dapo_mcore.weights.names import Parameter
from dapo_mcore.weights.save import copy_companions

RESIDENT = 256 << 20  # bytes of the source's pages that are kept in memory


class Source(Protocol):
    """Weights on disk, whatever their format."""

    path: Path

    @property
    def files(self) -> dict[Any, MappedFile]: ...

    def dtype(self, parameter: Parameter) -> torch.dtype: ...

    def hf_tensors(self, parameter: Parameter, expert: int) -> tuple[Tensor, ...]: ...

    def drop(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Sizes:
    """Megatron's parallel sizes, under whose ranks a checkpoint is laid out; it loads under any other."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1


def read_config(folder: Path) -> PretrainedConfig:
    """ValueError if there is none."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no readable config.json in it ({error}); name the Hugging Face folder it was made "
                         "from with --config") from None  # fmt: skip


def checkpoint_folder(path: Path) -> Path | None:
    """The distributed checkpoint in `path`, which may be that of a training step; None if there is none."""
    return next((folder for folder in (path, path / "policy") if (folder / INDEX).is_file()), None)


def open_source(path: Path, hf_config: Any) -> Source:
    """Raises ValueError if there are no weights, or not exactly those of the config."""
    checkpoint = checkpoint_folder(path)
    return McoreSource(checkpoint, hf_config) if checkpoint else HFSource(path, hf_config)


def hf_to_mcore(
    source: Path,
    target: Path,
    sizes: Sizes,
    dtype: torch.dtype | None,
    workers: int,
    progress: Callable[[int], Advance],
) -> None:
    """Write `target`, laid out for `sizes`; `dtype` None keeps the types of the files.

    Args:
        progress: told the bytes to be written, returns what is told those that are.

    Raises:
        ValueError: the source does not hold exactly the weights of its config, sizes do not fit, the target exists.
        OSError: the disk is full, say. What was written is kept, and the same call continues.
    """
    hf_config = read_config(source)
    layout = train_layout(hf_config, **asdict(sizes))
    opened = HFSource(source, hf_config)
    files = chunk_files(hf_config, layout, lambda parameter: dtype or opened.dtype(parameter))
    unfinished = Unfinished(target, _identity(opened, sizes=asdict(sizes), dtype=str(dtype)))
    jobs = [Job(file.name, file.size, partial(_records, file, opened)) for file in files]
    unfinished.write(jobs, workers, _frugal(opened, progress(sum(job.size for job in jobs))))
    write_index(unfinished.folder, files)
    copy_companions(source, unfinished.folder, files[0].chunks[0].dtype)
    McoreSource(unfinished.folder, hf_config)
    unfinished.finish()


def mcore_to_hf(source: Path, target: Path, config: Path, workers: int, progress: Callable[[int], Advance]) -> None:
    """Write `target` with config and tokenizer of the folder `config`. Arguments and errors as of `hf_to_mcore`."""
    checkpoint = checkpoint_folder(source)
    if checkpoint is None:
        raise ValueError(f"{source}: no {INDEX} in it or in its policy/, so it is no distributed checkpoint")
    hf_config = read_config(config)
    opened = McoreSource(checkpoint, hf_config)
    wanted = [target for parameter in opened.parameters for target in targets(parameter, opened.dtype(parameter))]
    files = tensor_files(wanted)
    unfinished = Unfinished(target, _identity(opened, config=str(config.resolve())))
    jobs = [Job(file.name, file.size, partial(_tensors, file, opened)) for file in files]
    unfinished.write(jobs, workers, _frugal(opened, progress(sum(job.size for job in jobs))))
    for name, text in index_of(files).items():
        (unfinished.folder / name).write_text(text)
    copy_companions(config, unfinished.folder, wanted[0].dtype)
    check_folder(HFFolder(unfinished.folder), hf_config)
    unfinished.finish()


def _records(file: ChunkFile, source: Source) -> Buffers:
    """A file of a distributed checkpoint."""
    for chunk in file.chunks:
        around = frame(chunk.sizes, chunk.dtype)
        yield memoryview(around.head)
        yield from slices(_piece(chunk, source), chunk.dtype)
        yield memoryview(around.tail + bytes(aligned(chunk.length) - chunk.length))


def _piece(chunk: Chunk, source: Source) -> Tensor:
    """[rows, columns]"""
    piece = chunk.piece
    if piece.tensor < 0:
        return torch.zeros(piece.extent)
    return rectangle(source.hf_tensors(chunk.parameter, chunk.expert)[piece.tensor], piece.source, piece.extent)


def _tensors(file: TensorFile, source: Source) -> Buffers:
    """A safetensors file."""
    yield memoryview(file.header)
    for (parameter, expert), group in groupby(file.targets, key=lambda target: (target.parameter, target.expert)):
        if expert < 0:
            (target,) = group
            yield from _stacked(target, source)
            continue
        tensors = source.hf_tensors(parameter, expert)
        for target in group:
            yield from slices(tensors[target.position], target.dtype)


def _stacked(target: Target, source: Source) -> Buffers:
    """A tensor that holds all experts, one after the other."""
    parameter = target.parameter
    for expert in range(parameter.experts):
        matrix = parameter.layout.to_mcore(source.hf_tensors(parameter, expert))
        yield from slices(matrix.mT if parameter.hf_forms[0].transposed else matrix, target.dtype)


def _frugal(source: Source, advance: Advance) -> Advance:
    """Drops what is in memory of the source again and again."""
    lock, since = Lock(), 0

    def told(count: int) -> None:
        nonlocal since
        with lock:
            advance(count)
            since += count
            if since >= RESIDENT:
                since = 0
                source.drop()

    return told


def _identity(source: Source, **options: Any) -> dict[str, Any]:
    """Tells one conversion from another."""
    state = {
        str(name): (path.stat().st_size, path.stat().st_mtime_ns)
        for name in sorted(source.files, key=str)
        for path in (source.path / name,)
    }
    return {"source": str(source.path.resolve()), "files": state, **options}
