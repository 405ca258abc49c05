"""What this package adds to a vLLM worker. vLLM itself imports this module, by the name it was given."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform

from dapo_mcore.rollout import vllm_ascend, vllm_cpu
from dapo_mcore.rollout.vllm_routes import RouteRecorder
from dapo_mcore.rollout.vllm_runtime import RuntimeWeights
from dapo_mcore.rollout.weight_channel import Meeting, receive


class WeightUpdate:
    """Methods added to the worker (`worker_extension_cls`)."""

    vllm_config: VllmConfig  # of the worker
    model_runner: Any  # of the worker
    route_recorder: RouteRecorder
    experts_asleep: vllm_ascend.Places = MappingProxyType({})  # where they were when the engine last fell asleep

    def prepare_to_sleep(self) -> None:
        """Before every sleep: remember how the model is when it can sample."""
        self.experts_asleep = vllm_ascend.places_of_experts(self.model_runner.get_model())

    def update_weights_from(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace every weight of the model by `weights`, pairs of HF name and full tensor; this rank keeps its cut.

        Parameters keep their addresses. `weights` is consumed lazily; a tensor must keep its value until its layer is
        complete, and layer after layer is the cheapest order.

        Raises:
            ValueError: the model has weights that did not come, or came in part. The model is unusable then.
        """
        model = self.model_runner.get_model()
        expected = {name for name, _ in model.named_parameters()}
        with set_current_vllm_config(self.vllm_config):
            if vllm_ascend.woke_to_be_loaded(model, self.experts_asleep):
                config, asleep = self.vllm_config.model_config, self.experts_asleep
                _refuse("did not come", expected - vllm_ascend.load_in_place(model, weights, config, asleep))
            else:
                self._update_layer_by_layer(model, weights, expected)

    def _update_layer_by_layer(
        self, model: nn.Module, weights: Iterable[tuple[str, Tensor]], expected: set[str]
    ) -> None:
        """A layer is loaded and brought into its runtime layout once all of its tensors have come, then copied over the
        old one. References to an incomplete layer's tensors are kept.
        """
        if current_platform.is_cpu():
            vllm_cpu.before_reload(model)
        initialize_layerwise_reload(model)
        _refuse("did not come", expected - model.load_weights(weights))  # type: ignore[operator]
        _refuse("came only in part", _incomplete_layers(model))
        finalize_layerwise_reload(model, self.vllm_config.model_config)
        if current_platform.is_cpu():
            vllm_cpu.after_reload(model)

    def receive_weights(self, meeting: Meeting, first_rank: int, host: str) -> None:
        """`update_weights_from` a push. The engine's workers are its receivers from `first_rank` on; see `receive`."""
        rank = first_rank + get_tensor_model_parallel_rank()
        self.update_weights_from(receive(meeting, rank, host))

    def write_weights(self, push: Callable[[RuntimeWeights], None]) -> None:
        """Let `push` write every parameter of the model in the layout in which vLLM loads it."""
        with set_current_vllm_config(self.vllm_config):
            push(RuntimeWeights(self.model_runner.get_model()))

    def examine_weights(self, question: Callable[[RuntimeWeights], str]) -> str:
        """The answer to a question about the model's parameters."""
        return question(RuntimeWeights(self.model_runner.get_model()))

    def record_routes(self) -> None:
        """Keep the experts of every token from here on (CPU)."""
        self.route_recorder = RouteRecorder(self.model_runner)

    def take_routes(self, requests: list[str]) -> dict[str, Any]:
        """See `RouteRecorder.take`."""
        return self.route_recorder.take(requests)


def _incomplete_layers(model: nn.Module) -> set[str]:
    """Layers that still wait for elements. Vocabulary layers are padded and never fill up; their tensors come whole."""
    return {
        name
        for name, layer in model.named_modules()
        if get_layerwise_info(layer).load_numel > 0 and not isinstance(layer, VocabParallelEmbedding)
    }


def _refuse(fate: str, weights: set[str]) -> None:
    if weights:
        raise ValueError(f"weights of the rollout engine's model that {fate}: {', '.join(sorted(weights))}")
