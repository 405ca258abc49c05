"""New weights into a live vLLM worker. vLLM mixes `WeightUpdate` into its worker class by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dapo_mcore.rollout import vllm_cpu

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class WeightUpdate:
    """Methods added to the worker (`worker_extension_cls`)."""

    vllm_config: VllmConfig  # of the worker
    model_runner: Any  # of the worker

    def update_weights_from(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace every weight of the model by `weights`, pairs of HF name and full tensor; this rank keeps its cut.

        `weights` is consumed lazily. Of an incomplete layer's tensors references are kept, so a tensor must keep its
        value until the iteration is over, and layer after layer is the cheapest order.

        Raises:
            ValueError: the model has weights that did not come, or came in part. The model is unusable then.
        """
        from vllm.config import set_current_vllm_config
        from vllm.platforms import current_platform

        model = self.model_runner.get_model()
        expected = {name for name, _ in model.named_parameters()}
        with set_current_vllm_config(self.vllm_config):
            if current_platform.is_cpu():
                loaded = _reload_packed(model, weights, self.vllm_config)
            else:  # runtime layout and loader's layout agree, and captured graphs hold the addresses: fill in place
                loaded = model.load_weights(weights)
        if missing := sorted(expected - loaded):
            raise ValueError(f"weights that the engine's model has did not come: {', '.join(missing)}")


def _reload_packed(model: Any, weights: Iterable[tuple[str, Tensor]], config: VllmConfig) -> set[str]:
    """Load layer by layer, pack into the CPU backend's private layouts, copy over the old ones."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    vllm_cpu.before_reload(model)
    initialize_layerwise_reload(model)
    loaded = model.load_weights(weights)
    if partial := _partly_loaded(model):
        raise ValueError(f"weights of these layers came only in part: {', '.join(partial)}")
    finalize_layerwise_reload(model, config.model_config)
    vllm_cpu.after_reload(model)
    return loaded


def _partly_loaded(model: nn.Module) -> list[str]:
    """Layers that still wait for elements. Vocabulary layers are padded and never fill up; their tensors come whole."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    return [name for name, layer in model.named_modules() if get_layerwise_info(layer).load_numel > 0
            and not isinstance(layer, VocabParallelEmbedding)]  # fmt: skip
