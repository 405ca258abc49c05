"""What Megatron allocates on one rank of a larger world whose other ranks do not exist: `python -m FILE < cases`.

Reads a JSON list of {"family", "dtype", "rank", "ranks", "megatron"}; prints as JSON for each the bytes of weights,
vision tower, gradients and optimizer after an update, and after them the bytes per token that a forward pass keeps for
the backward pass in each layer, by "family recompute".
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from dapo_mcore.actor import parallel
from dapo_mcore.actor.actor import assemble_actor
from dapo_mcore.actor.build import build_chunks, transformer_config
from dapo_mcore.actor.optimizer import build_optimizer, wrap_ddp
from dapo_mcore.config import ActorConfig, Dtype, MegatronConfig, OptimConfig, Recompute
from dapo_mcore.types import TrainBatch
from tests.tiny_vl import tiny_vl
from tools.tiny.model import tiny_config

SEQUENCES, LENGTH = 4, 64
new_group = dist.new_group


def sizes(case: dict[str, Any]) -> dict[str, int]:
    dist.init_process_group("fake", store=FakeStore(), rank=case["rank"], world_size=case["ranks"])
    dist.new_group = lambda *args, **options: new_group(*args, **{**options, "backend": "fake"})  # gloo's would wait
    options = MegatronConfig(**case["megatron"])
    parallel.init_model_parallel(options, seed=0)
    family, dtype = case["family"], Dtype[case["dtype"]]
    hf = tiny_vl(family).config if "_vl" in family else tiny_config(family, tied=family == "llama")
    config = transformer_config(hf, options, dtype)
    chunks = build_chunks(hf, config)
    ddp = wrap_ddp(chunks, config, options)
    optimizer = build_optimizer(ddp, config, options, OptimConfig())
    optimizer.step()
    named = [named for chunk in chunks for named in chunk.named_parameters()]
    weights = {parameter.untyped_storage().data_ptr() for _, parameter in named}
    tower = sum(parameter.nbytes for name, parameter in named if name.startswith("visual."))
    buffers = [buffer for chunk in ddp for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    states = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states += [v for _, state in optimizer.state.items() for v in state.values() if torch.is_tensor(v) and v.dim()]
    found = {
        "weights": sum(parameter.nbytes for _, parameter in named) - tower,
        "vision tower": tower,
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": sum(state.nbytes for state in states if state.untyped_storage().data_ptr() not in weights),
    }
    parallel.destroy_model_parallel()
    dist.destroy_process_group()
    dist.new_group = new_group
    return found


def kept(family: str, layers: int, recompute: Recompute) -> float:
    """Bytes per token, without weights, that autograd holds when the forward pass is over."""
    hf = tiny_config(family)
    hf.num_hidden_layers = layers
    options = ActorConfig(ppo_max_token_len_per_gpu=1 << 20, megatron=MegatronConfig(recompute=recompute))
    config = transformer_config(hf, options.megatron, Dtype.fp32)
    actor = assemble_actor(hf, config, build_chunks(hf, config), options, 1)
    weights = {parameter.untyped_storage().data_ptr() for chunk in actor.chunks for parameter in chunk.parameters()}
    held: dict[int, torch.Tensor] = {}

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        if backward.calls == 0 and tensor.untyped_storage().data_ptr() not in weights:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    backward = Counted(torch.autograd.backward)
    torch.autograd.backward = backward
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        actor.update(batch())
    torch.autograd.backward = backward.call
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values()) / (SEQUENCES * LENGTH)


class Counted:
    def __init__(self, call: Any) -> None:
        self.call, self.calls = call, 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        return self.call(*args, **options)


def batch() -> TrainBatch:
    tokens = SEQUENCES * (LENGTH - 1)
    return TrainBatch(
        token_ids=torch.arange(SEQUENCES * LENGTH) % 20,
        prompt_lengths=torch.full((SEQUENCES,), 1),
        response_lengths=torch.full((SEQUENCES,), LENGTH - 1),
        loss_mask=torch.ones(tokens, dtype=torch.bool),
        advantages=torch.ones(tokens),
        rollout_logprobs=torch.zeros(tokens),
    )


def per_layer() -> dict[str, float]:
    parallel.init_process_group()
    parallel.init_model_parallel(MegatronConfig(), seed=0)
    return {
        f"{family} {recompute.name}": kept(family, 2, recompute) - kept(family, 1, recompute)
        for family in ("llama", "qwen3_moe")
        for recompute in (Recompute.full, Recompute.none)
    }


print(json.dumps([*map(sizes, json.load(sys.stdin)), per_layer()]))
