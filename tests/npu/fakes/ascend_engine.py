"""An engine of vllm-ascend on a CPU: what its worker demands of those who change weights, it demands too.

Rules and order are those of vllm-ascend 0.23.0 (worker/worker.py, ops/fused_moe, device_allocator/camem.py), which
`Release.v0_23` follows, and of its main branch after 0.26 (`Release.newer`). Layerwise reload and post-processing are
vLLM's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from enum import Enum
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.utils import process_weights_after_loading

from dapo_mcore.rollout.vllm_worker import WeightUpdate
from tests.npu.fakes.ascend_model import LOADABLE, RUNTIME, MoeModel, demand, expert_parameter

TAGS = ("weights", "kv_cache")
CPU = torch.device("cpu")
Weights = Iterable[tuple[str, Tensor]]


class Release(Enum):
    v0_23 = "0.23"  # wakes in the loading layout, without loaders
    newer = "newer"  # wakes as it fell asleep, loaders kept


class Pool:
    """The memory of an engine that sleeps, under the rules of vllm-ascend's worker."""

    def __init__(
        self, release: Release, model: nn.Module, additional_config: Any, *, ep: bool, sleep_mode: bool
    ) -> None:
        default = int(os.environ.get("VLLM_ASCEND_ENABLE_NZ", "1"))
        self.release, self.model = release, model
        self.asleep: set[str] = set()
        self._nz_mode = (additional_config or {}).get("weight_nz_mode", default)
        self._is_expert_parallel, self._can_sleep = ep, sleep_mode
        self._host_copy: list[tuple[Tensor, Tensor]] = []
        if sleep_mode:
            self._demand_fixed_segments()

    def sleep(self, level: int) -> None:
        demand(self._can_sleep, "slept without enable_sleep_mode")
        demand(level == 1 or not self._is_expert_parallel, "level 2 drops expert_ids_per_ep_rank")
        self._demand_fixed_segments()
        tensors = [parameter.data for parameter in self.model.parameters()]
        self._host_copy = [(tensor, tensor.clone()) for tensor in tensors if level == 1]
        for tensor in tensors:
            tensor.fill_(torch.nan)
        self.asleep = set(TAGS)

    def wake_up(self, tags: list[str] | None) -> None:
        if self._nz_mode:
            raise ValueError("FRACTAL_NZ mode is enabled (weight_nz_mode)")
        self.asleep -= set(tags or TAGS)
        if "weights" in (tags or TAGS):
            for tensor, copy in self._host_copy:
                tensor.copy_(copy)
            if self.release is Release.v0_23:
                self._turn_back()

    def _turn_back(self) -> None:
        """Experts in their runtime layout become views in the layout in which they are loaded."""
        for layer in (module for module in self.model.modules() if "w13_weight" in module._parameters):
            for name in ("w13_weight", "w2_weight"):
                parameter: Any = getattr(layer, name)
                if parameter.order == RUNTIME:
                    setattr(layer, name, expert_parameter(parameter.data.transpose(1, 2), LOADABLE))

    @staticmethod
    def _demand_fixed_segments() -> None:
        expandable = "expandable_segments:True" in os.environ.get("PYTORCH_NPU_ALLOC_CONF", "")
        demand(not expandable, "expandable segments and the pool that sleeps exclude each other")


class AscendWorker:
    def __init__(self, release: Release, args: Any, weights: dict[str, Tensor], sizes: tuple[int, int]) -> None:
        self.vllm_config: Any = VllmConfig()
        self.vllm_config.model_config = SimpleNamespace(
            quantization=None, dtype=torch.float32, word_embeddings_untied_by_checkpoint=False
        )
        self.args, self.model = args, MoeModel(*sizes, keeps_loaders=release is Release.newer)
        traits = {"ep": args.enable_expert_parallel, "sleep_mode": args.enable_sleep_mode}
        self.pool = Pool(release, self.model, args.additional_config, **traits)
        self.model_runner = SimpleNamespace(get_model=lambda: self.model)
        self._is_updating = False
        self.model.load_weights(weights.items())
        process_weights_after_loading(self.model, self.vllm_config.model_config, CPU)
        self._captured = self._addresses()  # by the graphs

    def load_weights(self, weights: Weights) -> set[str]:
        """The model's own: reachable for everyone in the process."""
        demand("weights" not in self.pool.asleep, "loaded while the weights sleep")
        return self.model.load_weights(weights)

    def start_weight_update(self) -> None:
        if int(os.environ.get("VLLM_ASCEND_ENABLE_NZ", "1")):
            raise ValueError("FRACTAL_NZ mode is enabled (VLLM_ASCEND_ENABLE_NZ)")
        demand(not self._is_updating, "start_weight_update twice")
        initialize_layerwise_reload(self.model)
        self._is_updating = True

    def update_weights(self, weights: Weights) -> None:
        demand(self._is_updating, "update_weights before start_weight_update")
        self.model.load_weights(weights)

    def finish_weight_update(self) -> None:
        demand(self._is_updating, "finish_weight_update before start_weight_update")
        finalize_layerwise_reload(self.model, self.vllm_config.model_config)
        self._is_updating = False

    def logprobs(self, hidden: Tensor) -> Tensor:
        demand(not self.pool.asleep, f"sampled while {' and '.join(sorted(self.pool.asleep))} slept")
        result = self.model.next_logprobs(hidden)
        demand(self._addresses() == self._captured, "weights are not where the captured graphs read them")
        return result

    def _addresses(self) -> dict[str, int]:
        return {name: parameter.data_ptr() for name, parameter in self.model.named_parameters()}


class ExtendedWorker(AscendWorker, WeightUpdate):
    """As vLLM extends a worker by `worker_extension_cls`."""


class AscendEngine:
    """Of vLLM's LLMEngine what `VllmEngine` calls, with caches that answer wrongly when they are kept too long."""

    def __init__(self, release: Release, args: Any, weights: dict[str, Tensor], sizes: tuple[int, int]) -> None:
        self.worker = ExtendedWorker(release, args, weights, sizes)
        self.engine_core = SimpleNamespace(shutdown=lambda: None)
        self._prefixes: dict[tuple[int, ...], Tensor] = {}
        self._pictures: dict[int, Tensor] = {}

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        return [getattr(self.worker, method)(*args)]

    def sleep(self, level: int = 1) -> None:
        self.reset_prefix_cache()
        self.reset_encoder_cache()
        if "weights" not in self.worker.pool.asleep:
            self.worker.pool.sleep(level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        if set(tags or TAGS) <= self.worker.pool.asleep:
            self.worker.pool.wake_up(tags)

    def is_sleeping(self) -> bool:
        return bool(self.worker.pool.asleep)

    def reset_prefix_cache(self) -> bool:
        self._prefixes.clear()
        return True

    def reset_encoder_cache(self) -> None:
        self._pictures.clear()

    def reset_mm_cache(self) -> None:
        """What a picture was turned into before the model saw it does not depend on weights."""

    def sample(self, prompt: tuple[int, ...], picture: int) -> Tensor:
        """[vocabulary]: log-probabilities behind a prompt with a picture; both are remembered."""
        embed = self.worker.model.embed.weight
        before = self._prefixes.setdefault(prompt, embed[list(prompt)].sum(0))
        seen = self._pictures.setdefault(picture, embed[picture].clone())
        return self.worker.logprobs(before + seen)
