"""Which experts vLLM's CPU runner sends each token to. On accelerators vLLM returns them itself.

vLLM's own recording (`enable_return_routed_experts`) needs its second model runner, which needs Triton.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from vllm.model_executor.layers.fused_moe.layer import MoERunner


class RouteRecorder:
    """Keeps the choices of every router of a live model runner, by request and position.

    Prefix caching must be off: a token taken from the cache passes no router.
    """

    def __init__(self, model_runner: Any) -> None:
        config = model_runner.model_config
        self._num_layers = config.get_total_num_hidden_layers()
        self._top_k = config.get_num_experts_per_tok()
        self._dtype = np.uint8 if config.get_num_experts() <= 256 else np.int16
        self._runner = model_runner
        self._layers: dict[int, NDArray[Any]] = {}  # layer -> [tokens of the running step, top_k]
        self._pieces: dict[str, list[tuple[int, NDArray[Any]]]] = defaultdict(list)  # request -> (position, rows)
        for module in model_runner.get_model().modules():
            if isinstance(module, MoERunner):
                module.router.set_capture_fn(partial(self._capture, module.layer_id))
        self._execute = model_runner.execute_model
        model_runner.execute_model = self._execute_recorded

    def take(self, requests: Iterable[str]) -> dict[str, NDArray[Any]]:
        """Request id -> [tokens the model has read, layers, top_k]; 0 where a layer has no experts. Forgets them.

        A request that the model has not begun is left out.
        """
        return {request: self._join(self._pieces.pop(request)) for request in requests if request in self._pieces}

    def _join(self, parts: list[tuple[int, NDArray[Any]]]) -> NDArray[Any]:
        whole = np.zeros((max(start + len(rows) for start, rows in parts), *parts[0][1].shape[1:]), self._dtype)
        for start, rows in parts:  # a preempted request passes the routers again: the later choice is what it kept
            whole[start : start + len(rows)] = rows
        return whole

    def _capture(self, layer: int, chosen: Tensor) -> None:
        self._layers[layer] = chosen.numpy().astype(self._dtype)

    def _execute_recorded(self, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        self._layers = {}
        result = self._execute(scheduled, *args, **kwargs)
        if self._layers:
            self._keep(scheduled.num_scheduled_tokens)
        return result

    def _keep(self, num_tokens: dict[str, int]) -> None:
        """Cut the step's rows into its requests. Requests lie in the order of the runner's batch."""
        batch = self._runner.input_batch
        rows = np.zeros((sum(num_tokens.values()), self._num_layers, self._top_k), self._dtype)
        for layer, chosen in self._layers.items():
            rows[:, layer] = chosen
        row = 0
        for index, name in enumerate(batch.req_ids):
            count = num_tokens[name]
            request = name.rpartition("-")[0]  # vLLM has appended something random to the id it was given
            self._pieces[request].append((int(batch.num_computed_tokens_cpu[index]), rows[row : row + count]))
            row += count
