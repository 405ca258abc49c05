"""A rank of the sameness test: trains three steps, pushes after each, samples, keeps what everybody says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from dapo_mcore.actor import parallel
from dapo_mcore.actor.actor import Actor, build_actor
from dapo_mcore.config import ActorConfig, MegatronConfig, OptimConfig
from dapo_mcore.rollout.colocated import ColocatedEngine
from dapo_mcore.rollout.engine import Request, Sampling, generate, requests_for
from dapo_mcore.rollout.leader import lead
from dapo_mcore.types import Response, TrainBatch
from dapo_mcore.weights import save_hf
from tests.e2e.tiny_policies import LENGTHS, RESPONSE_LENGTH, Letters, model_config, prompts, rollout_config

STEPS = 3
LR = 3e-3  # large: weights that were not pushed must show


@dataclass(frozen=True)
class Case:
    family: str
    megatron: MegatronConfig
    rollout_tp: int

    def __str__(self) -> str:
        m = self.megatron
        layout = f"tp{m.tensor_model_parallel_size} ep{m.expert_model_parallel_size}"
        layout += f" pp{m.pipeline_model_parallel_size} cp{m.context_parallel_size}"
        return f"{self.family} | trained {layout} | rollout tp{self.rollout_tp}"


@dataclass(frozen=True)
class Said:
    """About the same sampled tokens, on the weights of one version; [N] each."""

    megatron: Tensor
    vllm: Tensor
    hugging_face: Tensor
    moved: float  # how far the log-probabilities are from those of the weights before training


def run_cases(cases: list[Case], folder: str) -> dict[str, list[Said]]:
    return {str(case): run_case(case, Path(folder)) for case in cases}


def run_case(case: Case, folder: Path) -> list[Said]:
    model = model_config(folder / case.family)
    options = ActorConfig(
        ppo_max_token_len_per_gpu=600,  # several micro-batches
        megatron=case.megatron,
        optim=OptimConfig(lr=LR, weight_decay=0.0),
    )
    parallel.init_model_parallel(case.megatron, seed=1)
    policy = build_actor(model, options, total_steps=STEPS)
    rollout = rollout_config(tensor_model_parallel_size=case.rollout_tp)
    engine = ColocatedEngine(model, rollout, Letters(), **LENGTHS)
    said: list[Said] = []
    for step in range(STEPS + 1):
        engine.load(policy.weights(), policy.step)
        requests = requests_for(prompts(4), n=2, run_seed=3, version=step)
        responses = lead(lambda: generate(engine, requests, Sampling(1.0, RESPONSE_LENGTH)), engine)  # noqa: B023
        batch = as_batch(requests, responses)
        export = folder / f"export_{dist.get_world_size()}"
        save_hf(policy.weights(), policy.hf_config, model.path, export)
        said.append(
            Said(
                megatron=policy.logprobs(batch),
                vllm=batch.rollout_logprobs,
                hugging_face=hf_logprobs(export, requests, responses),
                moved=float((hf_logprobs(Path(model.path), requests, responses) - batch.rollout_logprobs).abs().max()),
            )
        )
        train(policy, batch)
    parallel.destroy_model_parallel()
    return said


def train(policy: Actor, batch: TrainBatch) -> None:
    policy.update(policy.score(batch, responses_per_update=len(batch)))
    policy.finish_step()


def as_batch(requests: list[Request], responses: list[Response]) -> TrainBatch:
    """Advantages alternate in sign, nothing is masked."""
    lengths = torch.tensor([len(r.token_ids) for r in responses])
    signs = torch.tensor([1.0 if i % 2 else -1.0 for i in range(len(responses))])
    tokens = [t for q, r in zip(requests, responses, strict=True) for t in (*q.prompt.token_ids, *r.token_ids)]
    return TrainBatch(
        token_ids=torch.tensor(tokens),
        prompt_lengths=torch.tensor([len(q.prompt.token_ids) for q in requests]),
        response_lengths=lengths,
        loss_mask=torch.ones(int(lengths.sum()), dtype=torch.bool),
        advantages=signs.repeat_interleave(lengths),
        rollout_logprobs=torch.tensor([x for r in responses for x in r.logprobs]),
    )


@torch.no_grad()
def hf_logprobs(folder: Path, requests: list[Request], responses: list[Response]) -> Tensor:
    """[N] by transformers, from the exported files, one response at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    said = []
    for request, response in zip(requests, responses, strict=True):
        ids = torch.tensor([request.prompt.token_ids + response.token_ids])
        logits = model(ids).logits[0, len(request.prompt.token_ids) - 1 : -1]
        said.append(logits.log_softmax(-1).gather(-1, torch.tensor(response.token_ids)[:, None])[:, 0])
    return torch.cat(said)
