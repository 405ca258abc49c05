"""A policy that is saved and loaded while MindSpeed's optimizer is in the place of Megatron's."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch


def trains_on_as_if_it_had_stayed() -> list[str]:
    """What differs, to the bit, between the update after loading a checkpoint and the saved policy's next one.

    Not in a fork: whoever writes checkpoints starts processes that outlive it.
    """
    from dapo_mcore.actor import parallel
    from dapo_mcore.actor.actor import Actor, build_actor
    from dapo_mcore.checkpoint.store import CheckpointStore
    from dapo_mcore.config import ActorConfig, Dtype, MegatronConfig, ModelConfig, OptimConfig
    from tools.certificate.reference import random_batch, tiny_model

    parallel.init_process_group()
    parallel.destroy_model_parallel()
    parallel.init_model_parallel(MegatronConfig(), seed=0)
    batches = [random_batch(seed, [(5, 7), (4, 9), (6, 3)], old_logprobs=True) for seed in range(3)]
    options = ActorConfig(
        optim=OptimConfig(lr=1e-2),
        megatron=MegatronConfig(use_distributed_optimizer=True),
        ppo_max_token_len_per_gpu=64,
    )

    def after(actor: Actor, batch: Any) -> tuple[Any, dict[str, torch.Tensor]]:
        return actor.update(batch), {name: weight.clone() for name, weight in actor.weights()}

    with tempfile.TemporaryDirectory() as folder:
        tiny_model("qwen3_moe").save_pretrained(folder)
        stayed, loaded = (build_actor(ModelConfig(path=folder, dtype=Dtype.fp32), options, 10) for _ in range(2))
        store = CheckpointStore(Path(folder) / "checkpoints", keep=1)
        for batch in batches[:2]:
            stayed.update(batch)
        store.load(store.save(1, stayed, {}), loaded)
    (expected, weights), (found, others) = after(stayed, batches[2]), after(loaded, batches[2])
    metrics = [name for name in expected if found[name] != expected[name]]
    return metrics + [name for name in weights if not torch.equal(weights[name], others[name])]
