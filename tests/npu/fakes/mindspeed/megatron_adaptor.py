"""Importing it changes Megatron-Core; `repatch` sets the switches."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from npu_contract import require

from mindspeed import collectives, fusions, optimizer, transformer_config, transformer_engine

require("torch_npu" in sys.modules and hasattr(sys.modules["torch_npu"], "npu"), "torch_npu is imported first")
require(sys.argv[1:] == [], f"the command line is empty: {sys.argv[1:]} would be values of every TransformerConfig")
for _name in ("megatron.core", "transformers", "vllm"):
    require(_name not in sys.modules, f"{_name} is imported later")

REPATCHED: list[dict[str, Any]] = []


def change_megatron() -> None:
    logging.basicConfig(level=os.environ.get("MIND_SPEED_LOG_LEVEL", "INFO"), stream=sys.stdout, force=True)
    import torch_npu.contrib.transfer_to_npu  # noqa: F401

    from dapo_mcore.platform import megatron_cpu

    megatron_cpu.apply()  # the chip this package stands for is the CPU
    transformer_engine.pretend()
    transformer_engine.replace_layers()
    transformer_config.merge_switches()
    collectives.replace()
    optimizer.replace()


def repatch(switches: dict[str, Any]) -> None:
    from megatron.core import parallel_state

    require(isinstance(switches, dict), f"repatch takes a dict, not a {type(switches).__name__}")
    require(not REPATCHED, "repatch once: switches of the first call stay where the second leaves them out")
    require(not parallel_state.model_parallel_is_initialized(), "repatch before initialize_model_parallel")
    require(not transformer_config.MADE, "repatch before the first TransformerConfig")
    check(switches)
    REPATCHED.append(switches)
    collectives.replace()
    fusions.replace(switches)
    transformer_config.SWITCHES.update(switches)


def check(switches: dict[str, Any]) -> None:
    """Combinations that MindSpeed refuses, or that reach the wrong kernels."""
    get = switches.get
    require(get("use_flash_attn") is True, "use_flash_attn is True: without it there is no fused attention")
    require(not get("use_flash_attn_npu_batch_invariant"), "batch-invariant attention excludes use_flash_attn")
    require(get("sparse_mode", 0) in (0, 2), "sparse_mode is 0 or 2")
    require(get("moe_token_dispatcher_type") == "alltoall", "the dispatcher is alltoall")
    if get("use_fused_rotary_pos_emb"):
        require("position_embedding_type" in switches, "use_fused_rotary_pos_emb asks for position_embedding_type")
    require(get("context_parallel_size", 1) == 1, "its context parallelism takes other rows than ranks hold here")


change_megatron()
