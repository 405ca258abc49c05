"""The parameters of a live vLLM model as tensors to write to, in the layout in which vLLM would load them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform

from dapo_mcore.platform import platform
from dapo_mcore.rollout import vllm_cpu

# What is done to these after loading is nothing (CUDA) or known (CPU).
KNOWN_METHODS = {"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod", "UnquantizedFusedMoEMethod"}
KNOWN_PACKINGS = {"CPUDNNLGEMMHandler", "CPUUnquantizedExperts"}  # on a CPU: oneDNN's, and experts without AMX
REPACKED = {"UnquantizedLinearMethod", "UnquantizedFusedMoEMethod"}  # on a CPU, where these drop what they packed
PLAIN_EXPERTS = "TRITON"  # the one backend on CUDA that multiplies with [gate; up] and down as they are loaded


class RuntimeWeights:
    """Open tensors by runtime name, write, close them, and `finish` once after the last.

    Where vLLM multiplies with what it loads (CUDA), an open tensor is the live parameter: its address stays, captured
    graphs stay valid, `close` does nothing. On a CPU most layers hold their weights packed in a private layout: their
    open tensors are staged beside them, and closing them packs anew, exactly once, and frees the staging.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._parameters = dict(model.named_parameters(remove_duplicate=False))  # a tied head has two names
        self._staged: dict[str, Tensor] = {}

    @property
    def obstacle(self) -> str:
        """Why this model cannot be written to directly; empty if it can."""
        if reason := platform().engines.private_layout:
            return reason
        if not (current_platform.is_cpu() or current_platform.is_cuda()):
            return f"the runtime layout of vLLM on {current_platform.device_name} is private"
        dtypes = {str(parameter.dtype) for parameter in self._parameters.values()}
        if len(dtypes) > 1:  # some CPU kernels convert biases
            return f"the engine holds parameters as {' and '.join(sorted(dtypes))}"
        for name, module in self.model.named_modules():
            kind = _method(module)
            if not kind or not any(True for _ in module.parameters(recurse=False)):
                continue
            if kind not in KNOWN_METHODS:
                return f"{name} holds its weights as {kind} does"
            if current_platform.is_cpu() and (packing := vllm_cpu.packing(module)) not in KNOWN_PACKINGS:
                return f"{name} holds its weights packed for {packing}, a layout that is not known"
            backend = getattr(module.quant_method, "unquantized_backend", None)
            if backend is not None and current_platform.is_cuda() and backend.name != PLAIN_EXPERTS:
                return f"{name} runs on {backend.name}, whose layout of experts is private; use the Triton backend"
        return ""

    @property
    def is_in_place(self) -> bool:
        """Open tensors are the live parameters and stay where they are."""
        return not current_platform.is_cpu()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter as it is loaded. A tied head, and what an engine holds in two places, come once."""
        once = dict(self.model.named_parameters())
        return {name: tuple(self._as_loaded(name).shape) for name in once}

    def expert_slots(self, name: str) -> list[int] | None:
        """Of the layer with the expert parameter `name`: global expert -> local one, -1 for another rank's.

        None: the layer holds all experts, in order.
        """
        slots = getattr(self._layer(name), "_expert_map", None)
        return None if slots is None else slots.tolist()

    def open(self, name: str) -> Tensor:
        """Where to write the parameter `name`, every element that is not padding. KeyError if there is none."""
        if name in self._staged:
            return self._staged[name]
        parameter = self._parameters[name].data
        if not self._is_repacked(name):
            return parameter
        loaded = self._as_loaded(name)
        self._staged[name] = torch.zeros(loaded.shape, dtype=loaded.dtype, device=parameter.device)
        return self._staged[name]

    def close(self, names: Iterable[str]) -> None:
        """Take over what was written to `names`; all parameters of a layer are closed together."""
        layers: dict[nn.Module, None] = {}
        for name in names:
            if (staged := self._staged.pop(name, None)) is not None:
                layer = self._layer(name)
                setattr(layer, name.rpartition(".")[2], nn.Parameter(staged, requires_grad=False))
                layers[layer] = None
        for layer in layers:
            method: Any = layer.quant_method
            if hasattr(method, "moe_kernel"):
                method.moe_kernel = None  # see vllm_cpu.before_reload
            method.process_weights_after_loading(layer)

    def finish(self) -> None:
        """Embeddings and heads, tied ones too, multiply with what their parameter holds now."""
        if current_platform.is_cpu():
            vllm_cpu.after_reload(self.model)

    def _is_repacked(self, name: str) -> bool:
        layer, attribute = self._layer(name), name.rpartition(".")[2]
        return current_platform.is_cpu() and _method(layer) in REPACKED and attribute != "bias"

    def _as_loaded(self, name: str) -> Tensor:
        """Of the parameter's shape and dtype before vLLM packed it."""
        recorded, _ = get_layerwise_info(self._layer(name)).restore_metadata
        return recorded.get(name.rpartition(".")[2], self._parameters[name])

    def _layer(self, name: str) -> nn.Module:
        return self.model.get_submodule(name.rpartition(".")[0])


def _method(module: nn.Module) -> str:
    """What vLLM calls the way in which a layer holds its weights; empty where there is none to choose."""
    method = getattr(module, "quant_method", None)
    return "" if method is None else type(method).__name__
