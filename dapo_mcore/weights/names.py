"""The parameters of a model, one by one: a family's table with layers and sizes filled in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dapo_mcore.weights.boxes import Shape
from dapo_mcore.weights.families import family_of
from dapo_mcore.weights.layouts import Layout
from dapo_mcore.weights.sections import Form, Param, Section, Stage


@dataclass(frozen=True, slots=True)
class Parameter:
    section: Section
    row: Param
    layer: int  # repetition of the section, from 0; for Stage.LAYER the decoder layer
    experts: int  # 0: not an expert parameter
    layout: Layout  # of the parameter, or of one expert

    @property
    def hf_forms(self) -> tuple[Form, ...]:
        """With whole names, except that `{expert}` stays open."""
        return tuple(_filled(form, self.section.hf, self.layer) for form in self.row.hf)

    def mcore_forms(self, local_layer: int) -> tuple[Form, ...]:
        """Likewise, as `layer` is numbered in its model chunk."""
        return tuple(_filled(form, self.section.mcore, local_layer) for form in self.row.mcore)

    def checkpoint_keys(self, layers_stacked: bool) -> tuple[str, ...]:
        """Alternative keys in Megatron's distributed checkpoints, where all experts are one tensor; with
        `layers_stacked`, all layers are, too."""
        prefix = self._checkpoint_prefix(layers_stacked)
        return tuple(_filled(form, prefix, self.layer).names[0] for form in self.row.checkpoint or self.row.mcore)

    def checkpoint_modules(self, layers_stacked: bool) -> tuple[str, ...]:
        """Modules that may have an entry of their own there: those of the parameter, and those without parameters."""
        form = Form(() if self.experts else self.section.stateful)
        stateful = _filled(form, self._checkpoint_prefix(layers_stacked), self.layer).names
        return (*(key.rpartition(".")[0] for key in self.checkpoint_keys(layers_stacked)), *stateful)

    def _checkpoint_prefix(self, layers_stacked: bool) -> str:
        is_stacked = layers_stacked and self.section.stage is Stage.LAYER
        return self.section.mcore.replace("{layer}.", "") if is_stacked else self.section.mcore

    @property
    def vllm_forms(self) -> tuple[Form, ...]:
        return tuple(_filled(form, self.section.vllm, self.layer) for form in self.row.vllm)

    def hf_shapes(self, form: Form) -> dict[str, Shape]:
        """Shape of every tensor of one of `hf_forms`."""
        if form.stacked:
            matrix = self.layout.full_shape
            return {form.names[0]: (self.experts, *(reversed(matrix) if form.transposed else matrix))}
        return {
            name: shape
            for expert in range(max(self.experts, 1))
            for name, shape in zip(expert_names(form, expert), self.layout.hf_shapes, strict=True)
        }


def _filled(form: Form, prefix: str, layer: int) -> Form:
    names = tuple((prefix + name).replace("{layer}", str(layer)) for name in form.names)
    return Form(names, form.stacked, form.transposed)


def expert_names(form: Form, expert: int) -> tuple[str, ...]:
    return tuple(name.replace("{expert}", str(expert)) for name in form.names)


def parameters(hf_config: Any, padded_vocab: int | None = None) -> Iterator[Parameter]:
    """Every parameter in the order of export: embedding, layer by layer, norm, head."""
    for section in family_of(hf_config).sections:
        dims = section.dims(hf_config, padded_vocab)
        for layer in range(section.repeat(dims)):
            for row in section.params:
                if row.when(dims, layer):
                    yield Parameter(section, row, layer, dims.experts if row.is_expert else 0, row.layout(dims))


def hf_shapes(hf_config: Any) -> dict[str, Shape]:
    """Name and shape of every tensor of the exported model, in the order of export."""
    shapes: dict[str, Shape] = {}
    for parameter in parameters(hf_config):
        if not parameter.row.twin:
            shapes |= parameter.hf_shapes(parameter.hf_forms[0])
    return shapes
