"""vLLM inside this process: one rank's part of one rollout replica."""

from __future__ import annotations

import atexit
import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch.distributed as dist

from dapo_mcore.config import Dtype, ModelConfig, RolloutConfig
from dapo_mcore.rollout import vllm_cpu
from dapo_mcore.rollout.engine import Request, Sampling
from dapo_mcore.rollout.rng import undisturbed_rng
from dapo_mcore.rollout.vllm_env import prepare_environment
from dapo_mcore.types import FinishReason, Response

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from vllm import EngineArgs, LLMEngine, SamplingParams

    from dapo_mcore.rollout.vllm_runtime import RuntimeWeights

DTYPES: dict[Dtype, Literal["float32", "bfloat16"]] = {Dtype.fp32: "float32", Dtype.bf16: "bfloat16"}
WEIGHT_UPDATE = "dapo_mcore.rollout.vllm_worker.WeightUpdate"


class Tokenizer(Protocol):
    """Of a Hugging Face tokenizer, what turns responses into text."""

    eos_token_id: int | None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...


class VllmEngine:
    """An in-process vLLM engine whose weights are replaced between generations.

    With `rollout.tensor_model_parallel_size` above 1 this is one of so many consecutive ranks of the torch.distributed
    world; all of them make the same calls with the same arguments.

    Every request brings its own seed, so that its response does not depend on the other requests. The reported
    log-probabilities are those of the distribution that was sampled: after temperature, top-p and top-k; greedy
    responses get those of temperature 1. The process is changed as `prepare_environment` says.
    """

    version: int = -1  # of the weights; those of the model's folder come before the first `load`

    def __init__(
        self,
        model: ModelConfig,
        rollout: RolloutConfig,
        tokenizer: Tokenizer,
        *,
        max_prompt_length: int,
        max_response_length: int,
        job: str = "",
        record_routes: bool = False,
    ) -> None:
        """Load the model of `model.path`.

        Args:
            model: folder and dtype.
            rollout: engine options.
            tokenizer: decodes responses; its end-of-sequence token ends them, beside the model's own.
            max_prompt_length: tokens; longer prompts are refused.
            max_response_length: tokens.
            job: names this run's shared memory; the same on all ranks, used by no other run on the host.
            record_routes: responses can carry the experts of their tokens (`Sampling.routes`).

        Raises:
            ValueError: rollout.kv_cache_mb cannot hold one sequence; or vLLM refused the model or an option.
        """
        prepare_environment()
        self._tokenizer = tokenizer
        self._stop_token_ids = sorted(end_of_sequence(Path(model.path), tokenizer))
        self._max_prompt_length = max_prompt_length
        self._max_response_length = max_response_length
        self._record_routes = record_routes
        self._is_guest = dist.is_initialized()
        with undisturbed_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # vLLM's dependencies warn of one another; what matters is raised
            self._llm = _start(model, rollout, max_prompt_length + max_response_length, job, record_routes)
        if self._is_guest:  # vLLM tears the torch.distributed world down with a discarded engine: keep it to the end
            atexit.register(self._llm.engine_core.shutdown)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        """Responses in the order of `requests`.

        Raises:
            ValueError: a prompt or `sampling.max_tokens` is longer than the engine was built for.
        """
        self._refuse_overlong(requests, sampling)
        with undisturbed_rng():
            for position, request in enumerate(requests):
                prompt: Any = {"prompt_token_ids": list(request.prompt.token_ids)}
                self._llm.add_request(str(position), prompt, self._params(request, sampling))
            finished = {}
            while self._llm.has_unfinished_requests():
                finished |= {int(output.request_id): output for output in self._llm.step()}
        outputs = [finished[position] for position in range(len(requests))]
        routes = self._take_routes(outputs) if self._record_routes else [None] * len(outputs)
        return [
            self._response(output, chosen if sampling.routes else None)
            for output, chosen in zip(outputs, routes, strict=True)
        ]

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over `weights`, pairs of HF name and full tensor, and forget what was computed with the old ones.

        A sleeping engine gets the weights' memory back before, but not yet the KV cache's (`wake`).

        Raises:
            ValueError: a weight is missing.
            RuntimeError: the prefix cache was in use.
        """
        self._update("update_weights_from", weights, version)

    def write(self, push: Callable[[RuntimeWeights], None], version: int) -> None:
        """Let `push` write the weights where they lie; otherwise as `load`."""
        self._update("write_weights", push, version)

    def examine(self, question: Callable[[RuntimeWeights], str]) -> str:
        """The answer to a question about the parameters that `write` would write to."""
        (answer,) = self._llm.collective_rpc("examine_weights", args=(question,))
        return answer

    def _update(self, method: str, argument: Any, version: int) -> None:
        if self._llm.is_sleeping():
            self._llm.wake_up(["weights"])
        with undisturbed_rng():
            self._llm.collective_rpc(method, args=(argument,))
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache after a weight update: requests are still running")
        self.version = version

    def wake(self) -> None:
        """After `sleep` and `load`: take the KV cache's memory back, ready to sample."""
        if self._llm.is_sleeping():
            self._llm.wake_up(["kv_cache"])

    def sleep(self) -> None:
        """Give the memory of weights and KV cache to the trainer; the weights are lost. On a CPU nothing happens."""
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            self._llm.sleep(level=2)
            self.version = -1

    def close(self) -> None:
        """Free the engine and the torch.distributed world that vLLM made for it.

        In a world of the trainer's nothing happens before the process ends: vLLM would tear that world down.
        """
        if not self._is_guest:
            self._llm.engine_core.shutdown()

    def _refuse_overlong(self, requests: Sequence[Request], sampling: Sampling) -> None:
        if sampling.max_tokens > self._max_response_length:
            raise ValueError(
                f"{sampling.max_tokens} response tokens asked for, but data.max_response_length="
                f"{self._max_response_length} is what the engine has room for; ask for fewer or raise that"
            )
        for prompt in (request.prompt for request in requests):
            if len(prompt.token_ids) > self._max_prompt_length:
                raise ValueError(
                    f"prompt {prompt.uid} (row {prompt.row}) has {len(prompt.token_ids)} tokens, above "
                    f"data.max_prompt_length={self._max_prompt_length}; filter or truncate it, or raise that"
                )

    def _params(self, request: Request, sampling: Sampling) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            seed=request.seed,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            stop_token_ids=self._stop_token_ids,
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,  # one list instead of a dictionary per token
            detokenize=False,  # once at the end is cheaper than token by token
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _take_routes(self, outputs: Sequence[Any]) -> list[NDArray[Any]]:
        """Of each output [prompt + response - 1, layers, top_k]."""
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return [output.outputs[0].routed_experts for output in outputs]
        (recorded,) = self._llm.collective_rpc("take_routes")
        return [recorded[output.request_id] for output in outputs]

    def _response(self, output: Any, routes: NDArray[Any] | None) -> Response:
        (sample,) = output.outputs
        return Response(
            token_ids=tuple(sample.token_ids),
            logprobs=tuple(sample.logprobs.logprobs),
            text=self._tokenizer.decode(sample.token_ids, skip_special_tokens=True),
            finish_reason=FinishReason(sample.finish_reason),
            version=self.version,
            routes=routes,
        )


def end_of_sequence(model: Path, tokenizer: Tokenizer) -> set[int]:
    """Tokens that end a response, by the tokenizer and by the model folder's config.json and generation_config.json."""
    files = [file for name in ("config.json", "generation_config.json") if (file := model / name).is_file()]
    found = [tokenizer.eos_token_id, *(json.loads(file.read_text()).get("eos_token_id") for file in files)]
    lists = [entry if isinstance(entry, list) else [entry] for entry in found if entry is not None]
    return {token for entries in lists for token in entries}


def _start(model: ModelConfig, rollout: RolloutConfig, max_model_len: int, job: str, record_routes: bool) -> LLMEngine:
    """An engine in the torch.distributed world, if there is one, or in a world of its own."""
    from vllm import EngineArgs
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    if on_cpu:
        vllm_cpu.mend(job)
    is_one_of_many = dist.is_initialized() and dist.get_world_size() > 1
    if is_one_of_many:  # vLLM reads its place there; a launcher has set it
        os.environ.setdefault("RANK", str(dist.get_rank()))
        os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    args = EngineArgs(
        model=model.path,
        skip_tokenizer_init=True,
        dtype=DTYPES[model.dtype],
        max_model_len=max_model_len,
        tensor_parallel_size=rollout.tensor_model_parallel_size,
        enable_expert_parallel=rollout.enable_expert_parallel,
        distributed_executor_backend="external_launcher" if is_one_of_many else "uni",
        kv_cache_memory_bytes=rollout.kv_cache_mb << 20,
        gpu_memory_utilization=0.01,  # a start-up check of free memory and nothing else, the KV cache being given
        enable_prefix_caching=not (on_cpu and record_routes),  # see RouteRecorder
        enable_return_routed_experts=record_routes and not on_cpu,
        # On a CPU a seeded request whose prompt is cut into chunks dies: "CPU Generator does not use offset".
        enable_chunked_prefill=not on_cpu,
        max_num_batched_tokens=max(rollout.max_num_batched_tokens, max_model_len),
        max_num_seqs=rollout.max_num_seqs,
        enforce_eager=on_cpu or rollout.enforce_eager,
        enable_sleep_mode=not on_cpu,
        logprobs_mode="processed_logprobs",  # under the distribution that was sampled
        generation_config="vllm",  # sampling is said per request, not by a file of the model
        worker_extension_cls=WEIGHT_UPDATE,
        disable_log_stats=True,
        use_tqdm_on_load=False,
    )
    llm = _launch(args, rollout.kv_cache_mb)
    if record_routes and on_cpu:
        llm.collective_rpc("record_routes")
    return llm


def _launch(args: EngineArgs, kv_cache_mb: int) -> LLMEngine:
    from vllm import LLMEngine

    try:
        return LLMEngine.from_engine_args(args)
    except ValueError as error:
        if "kv cache" not in str(error).lower():
            raise
        raise ValueError(
            f"rollout.kv_cache_mb={kv_cache_mb}: no KV cache for sequences of {args.max_model_len} tokens "
            f"(data.max_prompt_length + data.max_response_length); set it to what fits. vLLM says: {error}"
        ) from error
