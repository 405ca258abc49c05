"""A process with the fakes on its path: lets every wrong caller run in a child, then does it right, and tells both."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import warnings
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from tests.npu import cross_entropy, wrong_callers
from tests.npu.certified import certified
from tests.npu.resumed import trains_on_as_if_it_had_stayed

# In every field of the layout and of recomputation, what no model here asks for.
FOREIGN: dict[str, Any] = {
    "tensor_model_parallel_size": 8,
    "pipeline_model_parallel_size": 4,
    "virtual_pipeline_model_parallel_size": 3,
    "context_parallel_size": 2,
    "sequence_parallel": True,
    "expert_model_parallel_size": 16,
    "expert_tensor_parallel_size": 2,
    "overlap_p2p_comm": True,
    "batch_p2p_comm": False,
    "recompute_granularity": "full",
    "recompute_method": "block",
    "recompute_num_layers": 7,
    "recompute_modules": ["moe"],
    "distribute_saved_activations": True,
    "moe_permute_fusion": True,
    "moe_grouped_gemm": False,
    "moe_token_dispatcher_type": "allgather",
    "apply_rope_fusion": True,
    "gradient_accumulation_fusion": True,
    "deterministic_mode": True,
}


def outcome(caller: wrong_callers.Caller) -> str:
    """How a call ends in a child of this process: "" or the error."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            caller()
            told = ""
        except BaseException as error:  # noqa: BLE001 - told to the parent
            told = f"{type(error).__name__}: {error}"
        os.write(writer, told.encode()[:4000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return told


def configs_with_foreign_switches() -> dict[str, list[str]]:
    """Model -> the fields in which a config differs once MindSpeed holds FOREIGN; "open": left to it."""
    from mindspeed import transformer_config as mindspeed

    from dapo_mcore.actor.build import transformer_config
    from dapo_mcore.config import Dtype, MegatronConfig
    from tests.tiny_vl import tiny_vl
    from tools.certificate.reference import tiny_model

    makers = {
        "dense": lambda: transformer_config(tiny_model("qwen3").config, MegatronConfig(), Dtype.fp32),
        "experts": lambda: transformer_config(tiny_model("qwen3_moe").config, MegatronConfig(), Dtype.fp32),
        "vision": lambda: transformer_config(tiny_vl("qwen3_vl_moe").config, MegatronConfig(), Dtype.fp32),
        "open": wrong_callers.open_config,
    }
    before = {name: make() for name, make in makers.items()}
    switches, mindspeed.SWITCHES = mindspeed.SWITCHES, mindspeed.SWITCHES | FOREIGN
    after = {name: attributes_of(make) for name, make in makers.items()}
    mindspeed.SWITCHES = switches
    return {name: differing(before[name], after[name]) for name in makers}


def attributes_of(make: Any) -> Any:
    try:
        return make()
    except (AssertionError, ValueError):  # what was filled in contradicts the rest
        return None


def differing(before: Any, after: Any) -> list[str]:
    if after is None:
        return ["refused"]
    plain = [field.name for field in fields(before) if not callable(getattr(before, field.name))]
    return [name for name in plain if getattr(before, name) != getattr(after, name)]


def tower_features(name: str) -> torch.Tensor:
    """Of two pictures, by the tower with the attention `name`."""
    from dapo_mcore.actor.vision.tower import visual_features
    from tests.tiny_vl import tiny_vl

    tower = tiny_vl("qwen3_vl").model.visual
    tower.set_attn_implementation(name)
    pixels = torch.randn(16 + 8, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    return visual_features(tower, pixels.split([16, 8]), torch.tensor([[2, 2], [2, 1]]))


def deterministic_mode() -> None:
    """HCCL and CANN read the environment when they start."""
    from dapo_mcore.platform import platform

    platform().make_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert (os.environ["HCCL_DETERMINISTIC"], os.environ["CLOSE_MATMUL_K_SHIFT"]) == ("true", "1")


def quiet() -> None:
    """Neither Python's nor the libraries' messages are printed that were not before torch_npu and MindSpeed came."""
    assert ("once", Warning) not in {(entry[0], entry[2]) for entry in warnings.filters}
    assert logging.getLogger().level >= logging.WARNING


def one_dtype() -> None:
    """Of all parameters of a policy in bf16."""
    from dapo_mcore.actor import parallel
    from dapo_mcore.actor.build import build_chunks, transformer_config
    from dapo_mcore.config import Dtype, MegatronConfig
    from tools.certificate.reference import tiny_model

    parallel.init_process_group()
    parallel.init_model_parallel(MegatronConfig(), seed=0)
    hf = tiny_model("qwen3_moe").config
    (chunk,) = build_chunks(hf, transformer_config(hf, MegatronConfig(), Dtype.bf16))
    others = [name for name, parameter in chunk.named_parameters() if parameter.dtype is not torch.bfloat16]
    assert others == [], others


def right() -> dict[str, Any]:
    import torch_npu

    from dapo_mcore.actor import parallel
    from dapo_mcore.actor.actor import build_actor
    from dapo_mcore.actor.vision.tower import build_tower
    from dapo_mcore.config import ActorConfig, Dtype, MegatronConfig, ModelConfig, OptimConfig, TowerTraining
    from dapo_mcore.platform import platform
    from tests.tiny_vl import tiny_vl
    from tools.certificate.reference import random_batch, tiny_model

    found = platform()
    parallel.init_process_group()
    parallel.init_model_parallel(MegatronConfig(), seed=0)
    parallel.destroy_model_parallel()
    parallel.init_model_parallel(MegatronConfig(), seed=0)  # the second layout of a process repatches nothing
    with tempfile.TemporaryDirectory() as folder:
        tiny_model("qwen3_moe").save_pretrained(folder)
        options = ActorConfig(optim=OptimConfig(lr=0.0), ppo_max_token_len_per_gpu=64)
        actor = build_actor(ModelConfig(path=folder, dtype=Dtype.fp32), options, 10)
    metrics = actor.update(random_batch(3, [(5, 7), (4, 9), (6, 3)], old_logprobs=True))
    text, torch_npu.RECORDS[:] = list(torch_npu.RECORDS), []
    seen = tower_features(found.tower_attention)
    tower, torch_npu.RECORDS[:] = list(torch_npu.RECORDS), []
    built = build_tower(tiny_vl("qwen3_vl").config.vision_config, torch.float32, TowerTraining.frozen, False)
    return {
        "platform": [found.name, found.collective_backend, found.has_transformer_engine, found.actor_resources(2)],
        "repatched": sys.modules["mindspeed.megatron_adaptor"].REPATCHED,
        "memory": asdict(found.memory_stats()),
        "backends": torch_npu.collectives.ASKED,
        "gradient_norm": metrics["actor/grad_norm"].value,
        "parameters": [name for name, _ in actor.chunks[0].named_parameters()],
        "text": [asdict(record) for record in text],
        "tower": [asdict(record) for record in tower],
        "tower_built_with": built.config._attn_implementation,
        "tower_error": float((seen - tower_features("sdpa")).abs().max()),
        "foreign": configs_with_foreign_switches(),
    }


CHECKS = (*cross_entropy.CHECKS, quiet, deterministic_mode, one_dtype)


def main(answer: Path) -> None:
    results = {name: outcome(caller) for name, caller in wrong_callers.EARLY.items()}
    arguments = list(sys.argv)
    import dapo_mcore.actor  # noqa: F401

    restored = sys.argv == arguments
    results |= {name: outcome(caller) for name, caller in wrong_callers.LATE.items()}
    checks = {check.__name__: outcome(check) for check in CHECKS}
    layouts = {"two layouts": ["DP2", "TP2+SP"], "CP2": ["CP2"], "fused": ["TP2xEP2, fused"]}
    ranks = {name: certified(chosen, "qwen3_moe") for name, chosen in layouts.items()}
    told = {"wrong": results, "checks": checks, "certified": ranks, "right": right() | {"arguments_restored": restored}}
    told["resumed"] = trains_on_as_if_it_had_stayed()
    answer.write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
