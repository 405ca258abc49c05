"""What vllm-ascend (0.23 and up) asks for where weights change."""

from __future__ import annotations

import os

from dapo_mcore.platform.engines import EngineTraits
from dapo_mcore.refuse import refuse

ALLOCATOR_VARIABLES = ("PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def refuse_expandable_segments() -> None:
    """The pool that sleeps cannot be made of segments that grow: vllm-ascend ends in an assertion.

    Raises:
        ValueError: an allocator variable asks for them.
    """
    for name in ALLOCATOR_VARIABLES:
        value = os.environ.get(name, "")
        if "expandable_segments:true" in value.lower().replace(" ", ""):
            refuse(name, value, "engines that sleep cannot live beside expandable segments", f"unset {name}")


def traits() -> EngineTraits:
    """NZ, a tiled weight format that no loader can write to, is switched off twice: vllm-ascend reads the option where
    an engine wakes, the variable where one that never slept takes new weights.

    Level 2 would drop tables of expert parallelism that lie in the weights' pool, and experts would compute wrongly.
    """
    return EngineTraits(
        sleep_level=1,
        private_layout="vllm-ascend holds experts transposed, in a layout of its own",
        options={"additional_config": {"weight_nz_mode": 0}},
        environment={"VLLM_ASCEND_ENABLE_NZ": "0"},
        refuse_environment=refuse_expandable_segments,
    )
