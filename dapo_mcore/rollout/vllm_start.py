"""Builds vLLM's engine from the options of a run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

import torch.distributed as dist

from dapo_mcore.config import Dtype, ModelConfig, RolloutConfig
from dapo_mcore.platform import platform
from dapo_mcore.rollout import vllm_cpu
from dapo_mcore.rollout.vllm_inputs import options_for_pictures

if TYPE_CHECKING:
    from vllm import EngineArgs, LLMEngine

    from dapo_mcore.prompts.vision import ImageTokens

DTYPES: dict[Dtype, Literal["float32", "bfloat16"]] = {Dtype.fp32: "float32", Dtype.bf16: "bfloat16"}
WORKER = "dapo_mcore.rollout.vllm_worker.WeightUpdate"
WORKER_PROCESS = "dapo_mcore.rollout.vllm_worker_process.WeightUpdate"


def start(
    model: ModelConfig,
    rollout: RolloutConfig,
    max_model_len: int,
    job: str,
    record_routes: bool,
    vision: ImageTokens | None,
) -> LLMEngine:
    """An engine in the torch.distributed world, if there is one, or in a world of its own.

    `max_model_len` is in tokens; `job`, `record_routes` and `vision` as of `VllmEngine`. Call `prepare_environment`
    before.

    Raises:
        ValueError: rollout.kv_cache_mb cannot hold one sequence; or vLLM refused the model or an option.
    """
    from vllm import EngineArgs
    from vllm.platforms import current_platform

    on_cpu, traits = current_platform.is_cpu(), platform().engines
    if on_cpu:
        vllm_cpu.mend(job)
    is_one_of_many = dist.is_initialized() and dist.get_world_size() > 1
    if is_one_of_many:  # vLLM reads its place there; a launcher has set it
        os.environ.setdefault("RANK", str(dist.get_rank()))
        os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    has_processes = rollout.tensor_model_parallel_size > 1 and not is_one_of_many
    if has_processes:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all of them are on this machine
    in_process = "external_launcher" if is_one_of_many else "uni"
    args = EngineArgs(
        model=model.path,
        dtype=DTYPES[model.dtype],
        max_model_len=max_model_len,
        tensor_parallel_size=rollout.tensor_model_parallel_size,
        enable_expert_parallel=rollout.enable_expert_parallel,
        distributed_executor_backend="mp" if has_processes else in_process,
        kv_cache_memory_bytes=rollout.kv_cache_mb << 20,
        gpu_memory_utilization=0.01,  # a start-up check of free memory and nothing else, the KV cache being given
        enable_prefix_caching=not (on_cpu and record_routes),  # see RouteRecorder
        enable_return_routed_experts=record_routes and not on_cpu,
        # On a CPU a seeded request whose prompt is cut into chunks dies: "CPU Generator does not use offset".
        enable_chunked_prefill=not on_cpu,
        max_num_batched_tokens=tokens_per_step(rollout, max_model_len, reads_chunks=not on_cpu),
        max_num_seqs=rollout.max_num_seqs,
        enforce_eager=on_cpu or rollout.enforce_eager,
        enable_sleep_mode=traits.sleep_level > 0,
        logprobs_mode="processed_logprobs",  # under the distribution that was sampled
        generation_config="vllm",  # sampling is said per request, not by a file of the model
        worker_extension_cls=WORKER_PROCESS if has_processes else WORKER,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **options_for_pictures(vision, max_model_len),
        **traits.options,
    )
    llm = _launch(args, rollout.kv_cache_mb)
    if record_routes and on_cpu:
        llm.collective_rpc("record_routes")
    return llm


def tokens_per_step(rollout: RolloutConfig, max_model_len: int, reads_chunks: bool) -> int:
    """What an engine reads and samples at a time: vLLM wants room for the longest sequence where it reads prompts whole
    (vllm.config.SchedulerConfig.verify_max_model_len).
    """
    asked = rollout.max_num_batched_tokens
    return asked if reads_chunks else max(asked, max_model_len)


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
