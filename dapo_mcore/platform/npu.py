"""Ascend NPUs, with HCCL. MindSpeed makes Megatron-Core run on them."""

from __future__ import annotations

import os
from typing import Any

import torch

from dapo_mcore.platform import ascend_engines, mindspeed
from dapo_mcore.platform.device import MemoryStats, Platform, UnusableDeviceError
from dapo_mcore.platform.pairings import refuse_wrong_pairs

DETERMINISTIC = {"HCCL_DETERMINISTIC": "true", "CLOSE_MATMUL_K_SHIFT": "1"}  # read when HCCL and CANN start


def load_torch_npu() -> Any:
    """torch.npu, once torch_npu is imported.

    Raises:
        UnusableDeviceError: torch_npu is missing, or stands beside a torch or a CANN that it cannot work with.
    """
    if torch.version.cuda is not None:
        raise UnusableDeviceError(
            f"torch {torch.__version__} is a build for CUDA, and torch_npu works with CPU builds only; install the CPU "
            "build of the version torch_npu was made for, or set DAPO_PLATFORM=cuda"
        )
    refuse_wrong_pairs()
    try:
        import torch_npu  # noqa: F401 # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:
        raise UnusableDeviceError(
            f"torch_npu cannot be imported ({str(error).strip().partition(chr(10))[0]}); source CANN's set_env.sh "
            "(ascend-toolkit and nnal/atb) and install the torch_npu made for this torch and CANN, or set "
            "DAPO_PLATFORM=cpu"
        ) from error
    return vars(torch)["npu"]


def platform() -> Platform:
    device = load_torch_npu()
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), int(device.device_count())
    if local_rank >= count:
        raise UnusableDeviceError(
            f"LOCAL_RANK={local_rank}, but this process sees {count} NPUs; start as many processes as `npu-smi info` "
            "lists, and look at ASCEND_RT_VISIBLE_DEVICES"
        )
    device.set_device(local_rank)
    here: Any = torch.empty(0)
    return Platform(
        name="npu",
        device=here.npu().device,
        collective_backend="cpu:gloo,npu:hccl",  # small decisions travel as CPU tensors
        has_transformer_engine=True,  # MindSpeed puts its own layers in the place of Transformer Engine's
        tower_attention="flash_attention_2",  # npu_fusion_attention over all images at once, without a mask
        pins_host_memory=True,
        actor_resources=lambda count: {"resources": {"NPU": count}},
        memory_stats=lambda: _memory_stats(device),
        synchronize=device.synchronize,
        empty_cache=device.empty_cache,
        adapt_megatron=mindspeed.adapt,
        configure_megatron=mindspeed.configure,
        make_deterministic=_make_deterministic,
        engines=ascend_engines.traits(),
    )


def _memory_stats(device: Any) -> MemoryStats:
    return MemoryStats(
        used=device.memory_allocated(), peak=device.max_memory_allocated(), total=device.mem_get_info()[1]
    )


def _make_deterministic() -> None:
    os.environ.update(DETERMINISTIC)
    torch.use_deterministic_algorithms(True)
