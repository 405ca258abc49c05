"""Where the parameters of a family live in this rank's model chunks; loading and export both walk this list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from torch.distributed import ProcessGroup

from dapo_mcore.platform import adapt_megatron
from dapo_mcore.weights.names import Parameter, expert_names, parameters
from dapo_mcore.weights.sections import Stage

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


@dataclass(frozen=True, slots=True)
class Groups:
    """The process groups over which weights are spread."""

    tensor: ProcessGroup
    expert_tensor: ProcessGroup
    expert: ProcessGroup
    pipeline: ProcessGroup

    @staticmethod
    def current() -> Groups:
        adapt_megatron()
        from megatron.core import parallel_state  # not above: conversion works without Megatron

        spread = (
            parallel_state.get_tensor_model_parallel_group(),
            parallel_state.get_expert_tensor_parallel_group(),
            parallel_state.get_expert_model_parallel_group(),
            parallel_state.get_pipeline_model_parallel_group(),
        )
        return Groups(*(cast(ProcessGroup, group) for group in spread))

    def cutting(self, parameter: Parameter) -> ProcessGroup:
        """The group over which a parameter's matrices are cut."""
        return self.expert_tensor if parameter.row.is_expert else self.tensor


@dataclass(frozen=True, slots=True)
class Home:
    """A parameter and its part on this rank: one tensor, or one per local expert; none on another pipeline stage."""

    parameter: Parameter
    shards: tuple[Tensor, ...]


def homes(chunks: Sequence[GPTModel], hf_config: Any, groups: Groups) -> list[Home]:
    """One entry per parameter of the model, in the order of export, equal on all ranks but for the shards.

    Raises ValueError, listing every one, if a parameter of a chunk is not in the family's table or appears in it twice,
    if a chunk lacks a parameter, or if a shape is not the one that the config and the layout give.
    """
    locals_ = [_LocalNames.of(chunk) for chunk in chunks]
    found: list[Home] = []
    defects: list[str] = []
    for parameter in parameters(hf_config, padded_vocab=chunks[0].vocab_size):
        holder = next((local for local in locals_ if local.holds(parameter)), None)
        shards = () if holder is None else holder.claim(parameter, groups, defects)
        found.append(Home(parameter, shards))
    for index, local in enumerate(locals_):
        defects += [f"  chunk {index}: {name} is unknown to the family or known twice" for name in local.unclaimed]
    if defects:
        raise ValueError(
            f"the Megatron model does not fit model_type={hf_config.model_type}; build it from the same config\n"
            + "\n".join(defects)
        )
    return found


@dataclass(frozen=True, slots=True)
class _LocalNames:
    """The parameters of one chunk, by name, and those not yet claimed by a row of the table."""

    chunk: GPTModel
    tensors: dict[str, Tensor]
    unclaimed: set[str]
    layers: dict[int, int]  # decoder layer of the model, from 0 -> position in this chunk

    @staticmethod
    def of(chunk: GPTModel) -> _LocalNames:
        tensors = {name: parameter.data for name, parameter in chunk.named_parameters()}
        numbers = [cast(int, layer.layer_number) for layer in chunk.decoder.layers]  # global, from 1
        layers = {number - 1: position for position, number in enumerate(numbers)}
        return _LocalNames(chunk, tensors, set(tensors), layers)

    def holds(self, parameter: Parameter) -> bool:
        match parameter.section.stage:
            case Stage.FIRST:
                return self.chunk.pre_process
            case Stage.LAST:
                return self.chunk.post_process
            case Stage.LAYER:
                return parameter.layer in self.layers

    def claim(self, parameter: Parameter, groups: Groups, defects: list[str]) -> tuple[Tensor, ...]:
        """The tensors of a parameter that this chunk holds; what is wrong with them is added to `defects`."""
        is_layer = parameter.section.stage is Stage.LAYER
        forms = parameter.mcore_forms(self.layers[parameter.layer] if is_layer else parameter.layer)
        present = [form for form in forms if expert_names(form, 0)[0] in self.tensors]
        if not present:
            if not parameter.row.twin:
                defects.append(f"  {' or '.join(name for form in forms for name in form.names)} is missing")
            return ()
        count = parameter.experts // groups.expert.size() if parameter.experts else 1
        names = [name for expert in range(count) for name in expert_names(present[0], expert)]
        defects += [f"  {name} is missing" for name in names if name not in self.tensors]
        names = [name for name in names if name in self.tensors]
        self.unclaimed.difference_update(names)
        wanted = parameter.layout.mcore(0, groups.cutting(parameter).size()).shape
        shards = tuple(self.tensors[name] for name in names)
        defects += [
            f"  {name}: shape {list(shard.shape)}, expected {list(wanted)}"
            for name, shard in zip(names, shards, strict=True)
            if shard.shape != wanted
        ]
        return shards
