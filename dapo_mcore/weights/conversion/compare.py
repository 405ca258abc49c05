"""Two models on disk, tensor by tensor, whatever their formats and layouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dapo_mcore.weights.conversion.convert import Source
from dapo_mcore.weights.conversion.files import Advance
from dapo_mcore.weights.names import Parameter, expert_names, hf_shapes, parameters

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Difference:
    name: str  # of the Hugging Face tensor
    what: str


def differences(
    first: Source, second: Source, hf_config: Any, progress: Callable[[int], Advance]
) -> Iterator[Difference]:
    """Every tensor whose type or bits differ, in the order of export.

    Args:
        progress: told the elements to be compared, returns what is told those that are.
    """
    advance = progress(sum(math.prod(shape) for shape in hf_shapes(hf_config).values()))
    for parameter in parameters(hf_config):
        if parameter.row.twin:
            continue
        for expert in range(max(parameter.experts, 1)):
            names = _names(parameter, expert)
            pairs = zip(first.hf_tensors(parameter, expert), second.hf_tensors(parameter, expert), strict=True)
            for name, (a, b) in zip(names, pairs, strict=True):
                what = _difference(a, b)
                if what:
                    yield Difference(name, what)
                advance(a.numel())
        first.drop()
        second.drop()


def _names(parameter: Parameter, expert: int) -> tuple[str, ...]:
    """Of the tensors of a parameter, or of an expert of it, which may be parts of one."""
    form = parameter.hf_forms[0]
    if not form.stacked:
        return expert_names(form, expert)
    parts = len(parameter.layout.hf_shapes)
    return tuple(f"{form.names[0]}: expert {expert}, part {part} of {parts}" for part in range(1, parts + 1))


def _difference(a: Tensor, b: Tensor) -> str:
    """Empty if there is none."""
    if a.dtype != b.dtype:
        return f"{_type(a)} against {_type(b)}"
    bits = _BITS[a.dtype.itemsize]
    unequal = a.contiguous().view(bits) != b.contiguous().view(bits)
    count = int(unequal.sum())
    if not count:
        return ""
    at = tuple(unequal.nonzero()[0].tolist())
    return f"{count} of {a.numel()} elements; first at {list(at)}: {a[at].item():g} against {b[at].item():g}"


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
