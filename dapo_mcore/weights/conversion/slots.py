"""Where a parameter lies in a distributed checkpoint: under which key, and where along its leading axes."""

from __future__ import annotations

from dataclasses import dataclass

from dapo_mcore.weights.boxes import Shape
from dapo_mcore.weights.names import Parameter
from dapo_mcore.weights.sections import Stage


@dataclass(frozen=True, slots=True)
class Slot:
    """The tensor under a key has the shape `extent` + the parameter's full shape; the parameter lies at `lead`."""

    keys: tuple[str, ...]  # alternatives for the same tensor
    lead: Shape  # layer, expert: those that have an axis
    extent: Shape  # layers, experts
    modules: tuple[str, ...]  # that may keep a state of their own beside it

    @property
    def state_keys(self) -> tuple[str, ...]:
        """Under which Megatron looks for the modules' states."""
        at, of = (".".join(map(str, axes)) for axes in (self.lead or (0,), self.extent or (1,)))
        return tuple(f"{module}._extra_state/shard_{at}_{of}" for module in self.modules)


def slot(parameter: Parameter, expert: int, layers: int, layers_stacked: bool) -> Slot:
    """Of a parameter, or of one of its experts, in a checkpoint of a model with `layers` layers."""
    axes: list[tuple[int, int]] = []
    if layers_stacked and parameter.section.stage is Stage.LAYER:
        axes.append((parameter.layer, layers))
    if parameter.experts:
        axes.append((expert, parameter.experts))
    lead, extent = tuple(at for at, _ in axes), tuple(length for _, length in axes)
    return Slot(parameter.checkpoint_keys(layers_stacked), lead, extent, parameter.checkpoint_modules(layers_stacked))
