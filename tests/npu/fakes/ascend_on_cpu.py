"""vLLM's own CPU engine under the rules of vllm-ascend: it samples really, and its experts lie as vllm-ascend's do.

The CPU backend multiplies with packed copies, which are made by post-processing alone. What a caller sees beside them
are experts transposed by it, linear layers that keep their weights, and a pool that sleeps.

A process with this folder on its path has it as a plugin that vLLM loads by itself, as it loads vllm-ascend.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tests.npu.fakes.ascend_engine import Pool, Release
from tests.npu.fakes.ascend_model import LOADABLE, RUNTIME, demand, expert_parameter

NAMES = ("w13_weight", "w2_weight")


def register() -> None:
    """The plugin: 0.23, unless FAKE_VLLM_ASCEND names another release."""
    install(Release(os.environ.get("FAKE_VLLM_ASCEND", Release.v0_23.value)))


def install(release: Release, set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """For the engines that this process starts from here on; before the first one. `monkeypatch.setattr` undoes it."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker.cpu_worker import CPUWorker

    pack_linear = UnquantizedLinearMethod.process_weights_after_loading
    pack_experts, multiply = UnquantizedFusedMoEMethod.process_weights_after_loading, UnquantizedFusedMoEMethod.apply

    def process_linear(method: Any, layer: Any) -> None:
        weight = layer.weight
        pack_linear(method, layer)
        layer.weight = weight

    def process_experts(method: Any, layer: Any) -> None:
        loaded: list[Any] = [getattr(layer, name) for name in NAMES]
        demand(all(order(weight) == LOADABLE for weight in loaded), "experts were post-processed twice, or not loaded")
        method.moe_kernel = None
        for name, weight in zip(NAMES, loaded, strict=True):
            setattr(layer, name, expert_parameter(weight.data.clone(), LOADABLE))
        pack_experts(method, layer)
        layer.packed = {name: layer._parameters[name] for name in NAMES}
        for name, weight in zip(NAMES, loaded, strict=True):
            kept = {"weight_loader": layer.weight_loader} if release is Release.newer else {}
            setattr(layer, name, expert_parameter(weight.data.transpose(1, 2).contiguous(), RUNTIME, **kept))

    def apply(method: Any, layer: Any, *arguments: Any, **options: Any) -> Tensor:
        runtime = {name: layer._parameters[name] for name in NAMES}
        demand(all(order(weight) == RUNTIME for weight in runtime.values()), "sampled with experts not in their layout")
        layer._parameters.update(layer.packed)
        try:
            return multiply(method, layer, *arguments, **options)
        finally:
            layer._parameters.update(runtime)

    def pool_of(worker: Any) -> Pool:
        if not hasattr(worker, "pool"):
            config = worker.vllm_config
            ep, sleep_mode = config.parallel_config.enable_expert_parallel, config.model_config.enable_sleep_mode
            model: nn.Module = worker.model_runner.get_model()
            worker.pool = Pool(release, model, config.additional_config, ep=ep, sleep_mode=sleep_mode)
        return worker.pool

    set_attribute(UnquantizedLinearMethod, "process_weights_after_loading", process_linear)
    set_attribute(UnquantizedFusedMoEMethod, "process_weights_after_loading", process_experts)
    set_attribute(UnquantizedFusedMoEMethod, "apply", apply)
    set_attribute(CpuPlatform, "is_sleep_mode_available", lambda platform: True)
    set_attribute(CPUWorker, "sleep", lambda worker, level=1: pool_of(worker).sleep(level))
    set_attribute(CPUWorker, "wake_up", lambda worker, tags=None: pool_of(worker).wake_up(tags))


def order(parameter: Any) -> str:
    """A parameter that vLLM has just created can be loaded."""
    return getattr(parameter, "order", LOADABLE)
