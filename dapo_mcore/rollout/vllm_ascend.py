"""How vllm-ascend takes new weights after it has slept.

Its grouped product wants experts transposed: what is loaded as w13 [E, 2I, H] and w2 [E, H, I] runs as [E, H, 2I] and
[E, I, H]. An engine of 0.23 that wakes turns its experts back into the shapes in which they are loaded, as views of the
memory they had, without their loaders: it must be loaded then, and processed exactly once, before it samples. Newer
ones wake as they fell asleep. Which of both happened is seen in the parameters; no version is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.utils import process_weights_after_loading

EXPERT_WEIGHTS = ("w13_weight", "w2_weight")


@dataclass(frozen=True, slots=True)
class Place:
    """How and where a parameter lies in memory. Of an expert's two matrices at most one is square."""

    shape: tuple[int, ...]
    address: int

    @staticmethod
    def of(tensor: Tensor) -> Place:
        return Place(tuple(tensor.shape), tensor.data_ptr())


Places = Mapping[str, Place]  # by name of the parameter


def places_of_experts(model: nn.Module) -> Places:
    """Empty for a dense model."""
    return {
        f"{name}.{weight}": Place.of(getattr(layer, weight))
        for name, layer in _layers_of_experts(model)
        for weight in EXPERT_WEIGHTS
    }


def woke_to_be_loaded(model: nn.Module, asleep: Places) -> bool:
    """Whether experts lie otherwise than when the engine fell asleep, wherever that is now."""
    awake = places_of_experts(model)
    return any(awake[name].shape != was.shape for name, was in asleep.items())


def load_in_place(
    model: nn.Module, weights: Iterable[tuple[str, Tensor]], model_config: ModelConfig, asleep: Places
) -> set[str]:
    """Load `weights` into a model that woke in its loading layout, and bring it back into its runtime layout.

    Args:
        model: of the worker; the KV cache is still asleep.
        weights: HF name and full tensor; consumed lazily.
        model_config: of the worker.
        asleep: where the experts were when the engine fell asleep.

    Returns:
        the names of the parameters that were loaded.

    Raises:
        RuntimeError: experts have moved; captured graphs would go on with the old ones.
    """
    for _, layer in _layers_of_experts(model):
        for weight in EXPERT_WEIGHTS:
            getattr(layer, weight).weight_loader = layer.weight_loader
    loaded = model.load_weights(weights)  # type: ignore[operator]
    process_weights_after_loading(model, model_config, next(model.parameters()).device)
    places = places_of_experts(model)
    if moved := sorted(name for name, place in asleep.items() if places[name] != place):
        raise RuntimeError(
            f"vllm-ascend did not bring {moved[0]} back to where its graphs look for it, after new weights were loaded "
            f"({places[moved[0]]} instead of {asleep[moved[0]]}); this version of vllm-ascend is not known"
        )
    return loaded


def _layers_of_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, layer) for name, layer in model.named_modules() if "w13_weight" in layer._parameters)
