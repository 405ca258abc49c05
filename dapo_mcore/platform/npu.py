"""Ascend NPUs. Recognised, but not served."""

from __future__ import annotations

from dapo_mcore.platform.device import Platform


class UnsupportedPlatformError(RuntimeError):
    """The device is recognised, but a part needed to train on it does not exist."""


def platform() -> Platform:
    raise UnsupportedPlatformError(
        "torch_npu is installed, so this is an Ascend machine, but dapo_mcore has no MindSpeed adapter for "
        "Megatron-Core and no HCCL process groups; run in an environment without torch_npu to train on the CPU"
    )
