"""What a declaration of a model family is made of: parameters in sections, and the tensors that hold them.

Names are relative to their section. `{layer}` counts from 0: over the whole model in Hugging Face and vLLM, within a
model chunk in Megatron. `{expert}` counts over all experts in Hugging Face, over a rank's own experts in Megatron.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from dapo_mcore.weights.layouts import Layout


@dataclass(frozen=True, slots=True)
class Form:
    """The tensors that hold one parameter together, or one expert's part of it."""

    names: tuple[str, ...]
    stacked: bool = False  # one tensor with all experts along dimension 0, the parts of each already joined
    transposed: bool = False  # the matrix of each expert lies transposed


@dataclass(frozen=True, slots=True)
class Param:
    """A row of the table. Of several forms exactly one is met; Hugging Face files are written in the first.

    A row with a `twin` is Megatron's second home of a parameter declared above: filled where a chunk has it, never
    exported. The twin is the Hugging Face name under which some files repeat the parameter.

    Distributed checkpoints use the names of `mcore`, all experts along an axis, unless `checkpoint` gives another.
    """

    hf: tuple[Form, ...]
    mcore: tuple[Form, ...]
    vllm: tuple[Form, ...]
    layout: Callable[[Any], Layout]  # from the section's dims
    when: Callable[[Any, int], bool] = lambda dims, layer: True
    is_expert: bool = False  # one per expert: spread over expert parallel ranks, cut over expert tensor parallel ranks
    twin: str = ""
    checkpoint: tuple[Form, ...] = ()


class Stage(Enum):
    """The pipeline stage that holds a section."""

    FIRST = "first"
    LAYER = "layer"  # the one that holds decoder layer `layer`
    LAST = "last"


@dataclass(frozen=True, slots=True)
class Section:
    """Parameters that share their prefixes, their stage and the number of times they repeat."""

    hf: str
    mcore: str
    vllm: str
    stage: Stage
    dims: Callable[[Any, int | None], Any]  # of (Hugging Face config, padded vocabulary)
    params: tuple[Param, ...]
    repeat: Callable[[Any], int] = lambda dims: 1  # from the dims
    stateful: tuple[str, ...] = ()  # modules of Megatron that have no parameters but an entry in checkpoints


@dataclass(frozen=True, slots=True)
class Family:
    model_type: str  # of the Hugging Face config
    sections: tuple[Section, ...]


def together(*names: str) -> tuple[Form, ...]:
    """One form of several tensors."""
    return (Form(names),)


def either(*names: str) -> tuple[Form, ...]:
    """Several forms of one tensor."""
    return tuple(Form((name,)) for name in names)
