"""The experts that vLLM chooses at rollout, and what replaying them in the trainer is worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers

from dapo_mcore.actor import parallel
from dapo_mcore.actor.actor import Actor, build_actor
from dapo_mcore.actor.routing import RouterReplayError
from dapo_mcore.batch import make_batch
from dapo_mcore.config import ActorConfig, AlgorithmConfig, DataConfig, Dtype, MegatronConfig, MoeConfig, RewardConfig
from dapo_mcore.rollout.engine import Request, Sampling, generate
from dapo_mcore.rollout.vllm_engine import VllmEngine
from dapo_mcore.types import Group, Response, Sample, TrainBatch, Verdict
from tests.e2e.tiny_policies import SIZES, Letters, model_config, requests, rollout_config

LAYERS, EXPERTS, TOP_K = 6, 32, 2
PROMPT, RESPONSE = 20, 40
SAMPLING = Sampling(temperature=1.0, max_tokens=RESPONSE, routes=True)


def save_policy(folder: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """Random, with experts that differ: a token sent elsewhere gets another distribution."""
    options = {"num_hidden_layers": LAYERS, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K}
    config = transformers.Qwen3MoeConfig(**{**SIZES, **options}, norm_topk_prob=True, moe_intermediate_size=64,
                                         mlp_only_layers=[1])  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Qwen3MoeForCausalLM(config)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.dim() > 1):
                parameter.add_(torch.randn_like(parameter) * 0.15)
    model = model.to(dtype).eval()
    model.save_pretrained(folder)
    return model


def rollout(folder: Path, dtype: Dtype, wanted: Sequence[Request]) -> list[Response]:
    engine = VllmEngine(model_config(folder, dtype), rollout_config(max_num_seqs=8), Letters(),
                        max_prompt_length=PROMPT, max_response_length=RESPONSE, record_routes=True)  # fmt: skip
    try:
        return generate(engine, wanted, SAMPLING)
    finally:
        engine.close()


def batch_of(wanted: Sequence[Request], responses: Sequence[Response]) -> TrainBatch:
    groups = [Group(q.prompt, (Sample(r, Verdict(1.0, 1.0)),)) for q, r in zip(wanted, responses, strict=True)]
    algorithm = AlgorithmConfig(norm_adv_by_std_in_grpo=False)
    reward = RewardConfig()
    reward.overlong_buffer.enable = False
    return make_batch(groups, algorithm, reward, DataConfig(max_response_length=RESPONSE))


@contextmanager
def actor(folder: Path, dtype: Dtype, replay: bool) -> Iterator[Actor]:
    parallel.init_process_group()
    parallel.init_model_parallel(MegatronConfig(), seed=0)
    try:
        options = ActorConfig(moe=MoeConfig(router_replay=replay), ppo_max_token_len_per_gpu=512)
        yield build_actor(model_config(folder, dtype), options, total_steps=1)
    finally:
        parallel.destroy_model_parallel()
        dist.destroy_process_group()


@torch.no_grad()
def own_choices(model: transformers.PreTrainedModel, request: Request, response: Response) -> torch.Tensor:
    """[prompt + response - 1, layers, top_k]: of Hugging Face's routers, sorted; zeros in the dense layer."""
    found = torch.zeros(PROMPT + len(response.token_ids) - 1, LAYERS, TOP_K, dtype=torch.int64)

    def keep(layer: int, gate: torch.nn.Module, args: object, output: tuple[torch.Tensor, ...]) -> None:
        found[:, layer] = output[2].sort(-1).values

    hooks = [
        block.mlp.gate.register_forward_hook(partial(keep, layer))
        for layer, block in enumerate(model.model.layers)
        if hasattr(block.mlp, "gate")
    ]
    model(torch.tensor([[*request.prompt.token_ids, *response.token_ids[:-1]]]))
    for hook in hooks:
        hook.remove()
    return found


def test_responses_carry_the_experts_the_model_chooses(tmp_path: Path) -> None:
    model, wanted = save_policy(tmp_path, torch.float32), requests(12, 2, PROMPT)  # more than are decoded together
    responses = rollout(tmp_path, Dtype.fp32, wanted)
    for request, response in zip(wanted, responses, strict=True):
        assert response.routes is not None
        recorded = torch.from_numpy(response.routes).long().sort(-1).values
        truth = own_choices(model, request, response)
        assert recorded.shape == truth.shape
        # a tie within rounding may fall either way
        assert (recorded != truth).any(-1).float().mean() <= 0.002


def test_replay_brings_the_gap_between_engine_and_trainer_down_by_more_than_three(tmp_path: Path) -> None:
    save_policy(tmp_path, torch.bfloat16)
    wanted = requests(8, 4, PROMPT)
    batch = batch_of(wanted, rollout(tmp_path, Dtype.bf16, wanted))
    gaps = {}
    for replay in (False, True):
        with actor(tmp_path, Dtype.bf16, replay) as policy:
            gaps[replay] = (policy.logprobs(batch) - batch.rollout_logprobs).abs().mean().item()
            metrics = policy.update(batch)
    print(f"mean |log pi_trainer - log pi_engine|: {gaps[False]:.4f} without, {gaps[True]:.4f} with replay")
    assert 0.0 < metrics["moe/replay_changed_fraction"].value < 0.2, "the engines' routers agree, or nothing does"
    assert gaps[False] >= 3 * gaps[True]


def test_a_run_with_replay_fails_when_responses_bring_no_experts(tmp_path: Path) -> None:
    save_policy(tmp_path, torch.float32)
    wanted = requests(1, 1, PROMPT)
    tokens = tuple(range(1, 9))
    response = Response(tokens, (-1.0,) * len(tokens), "", "stop", 0)  # type: ignore[arg-type]
    with actor(tmp_path, Dtype.fp32, replay=True) as policy, pytest.raises(RouterReplayError, match="layer 0: 0 repl"):
        policy.update(batch_of(wanted, [response]))
