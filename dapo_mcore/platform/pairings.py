"""Which packages of an Ascend stack go together (docs/ascend_install.md), told by their metadata: nothing is imported.

Wrong pairs fail late and unclearly, or compute with interfaces that have changed.
"""

from __future__ import annotations

import re
from importlib import metadata

from dapo_mcore.platform.device import UnusableDeviceError

Release = tuple[int, ...]

OLDEST_ENGINE = (0, 23)  # how vllm-ascend takes new weights differs before
MEGATRON = (0, 16, 1), (0, 17)  # from, up to: what MindSpeed's branch core_r0.16.0 changes
DOCTOR = "`python -m tools.doctor npu` looks at every part"


def refuse_wrong_pairs() -> None:
    """Packages without metadata, as of a folder on PYTHONPATH, are not looked at.

    Raises:
        UnusableDeviceError: the first pair that does not go together, with both versions and what to install.
    """
    torch, torch_npu = release("torch"), release("torch-npu")
    if torch and torch_npu and torch != torch_npu:
        numbers = _text(torch_npu)
        _refuse("torch", "torch-npu", "is made for the torch of its own numbers", f"the CPU build of torch=={numbers}")
    vllm, vllm_ascend = release("vllm"), release("vllm-ascend")
    if vllm and vllm_ascend and vllm != vllm_ascend:
        _refuse("vllm", "vllm-ascend", "is made for the vllm of its own numbers", f"vllm-ascend=={_text(vllm)}")
    if vllm and vllm_ascend and vllm_ascend < OLDEST_ENGINE:
        _refuse("vllm", "vllm-ascend", "takes new weights in a way unknown here", "0.23.0 of both")
    megatron = release("megatron-core")
    if megatron and not MEGATRON[0] <= megatron < MEGATRON[1]:
        raise UnusableDeviceError(
            f"megatron-core {metadata.version('megatron-core')}: MindSpeed's branch core_r0.16.0 is made for 0.16.1; "
            f"install megatron-core=={_text(MEGATRON[0])}; {DOCTOR}"
        )


def release(package: str) -> Release:
    """The leading numbers of a version: (2, 10, 0) of 2.10.0.post4; empty where there is no metadata, or none left."""
    try:
        found = re.match(r"\d+(\.\d+)*", metadata.version(package) or "")
    except metadata.PackageNotFoundError:
        return ()
    return tuple(int(number) for number in found[0].split(".")) if found else ()


def _text(numbers: Release) -> str:
    return ".".join(map(str, numbers))


def _refuse(first: str, second: str, reason: str, way_out: str) -> None:
    raise UnusableDeviceError(
        f"{first} {metadata.version(first)} beside {second} {metadata.version(second)}: {second} {reason}; "
        f"install {way_out}; {DOCTOR}"
    )
