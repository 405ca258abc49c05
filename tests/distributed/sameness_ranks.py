"""A rank of the sameness test: trains three steps, pushes after each, samples, keeps what everybody says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from dapo_mcore.actor import parallel
from dapo_mcore.actor.actor import Actor, build_actor
from dapo_mcore.config import ActorConfig, MegatronConfig, OptimConfig, TowerTraining, VisionConfig
from dapo_mcore.rollout.colocated import ColocatedEngine
from dapo_mcore.rollout.engine import Request, Sampling, generate, requests_for
from dapo_mcore.rollout.leader import lead
from dapo_mcore.types import EncodedImage, Prompt, Response, TrainBatch, Visual
from dapo_mcore.weights import save_hf
from tests.e2e.tiny_policies import LENGTHS, RESPONSE_LENGTH, Letters, model_config, prompts, rollout_config
from tests.e2e.tiny_vl_policies import MAX_PIXELS, MIN_PIXELS, image_tokens, processor, some_prompts, tokenizer
from tests.e2e.tiny_vl_policies import PROMPT_LENGTH as VL_PROMPT_LENGTH
from tests.tiny_vl import IMAGE, KINDS
from tools.certificate.vision import image_inputs

PixelsOf = Callable[[EncodedImage], Tensor]
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


@dataclass(frozen=True)
class Asked:
    """What a policy is asked, and what its engine needs for it."""

    prompts: list[Prompt]
    engine: dict[str, Any]
    pixels_of: PixelsOf | None = None


def asked_of(case: Case, folder: Path) -> Asked:
    if case.family not in KINDS:
        return Asked(prompts(4), {"tokenizer": Letters(), **LENGTHS})
    vision = image_tokens(folder)
    lengths = {"max_prompt_length": VL_PROMPT_LENGTH, "max_response_length": RESPONSE_LENGTH}
    return Asked(some_prompts(vision), {"tokenizer": tokenizer(), "vision": vision, **lengths}, processed)


def processed(image: EncodedImage) -> Tensor:
    """[patches, numbers] by the processor of the model's folder."""
    size = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    return processor().image_processor([image.decode()], size=size, return_tensors="pt")["pixel_values"]


def run_case(case: Case, folder: Path) -> list[Said]:
    model = model_config(folder / case.family)
    options = ActorConfig(
        ppo_max_token_len_per_gpu=600,  # several micro-batches
        megatron=case.megatron,
        optim=OptimConfig(lr=LR, weight_decay=0.0),
        vision=VisionConfig(train=TowerTraining.all),
    )
    parallel.init_model_parallel(case.megatron, seed=1)
    policy = build_actor(model, options, total_steps=STEPS)
    rollout = rollout_config(tensor_model_parallel_size=case.rollout_tp)
    asked = asked_of(case, folder / case.family)
    engine = ColocatedEngine(model, rollout, **asked.engine)
    said: list[Said] = []
    for step in range(STEPS + 1):
        engine.load(policy.weights(), policy.step)
        requests = requests_for(asked.prompts, n=2, run_seed=3, version=step)
        responses = lead(lambda: generate(engine, requests, Sampling(1.0, RESPONSE_LENGTH)), engine)  # noqa: B023
        batch = as_batch(requests, responses, asked.pixels_of)
        export = folder / f"export_{dist.get_world_size()}"
        save_hf(policy.weights(), policy.hf_config, model.path, export)
        said.append(
            Said(
                megatron=policy.logprobs(batch),
                vllm=batch.rollout_logprobs,
                hugging_face=hf_logprobs(export, batch),
                moved=float((hf_logprobs(Path(model.path), batch) - batch.rollout_logprobs).abs().max()),
            )
        )
        train(policy, batch)
    parallel.destroy_model_parallel()
    return said


def train(policy: Actor, batch: TrainBatch) -> None:
    policy.update(policy.score(batch, responses_per_update=len(batch)))
    policy.finish_step()


def as_batch(requests: list[Request], responses: list[Response], pixels_of: PixelsOf | None) -> TrainBatch:
    """Advantages alternate in sign, nothing is masked."""
    lengths = torch.tensor([len(r.token_ids) for r in responses])
    signs = torch.tensor([1.0 if i % 2 else -1.0 for i in range(len(responses))])
    shown = [q.prompt for q in requests]
    tokens = [t for prompt, r in zip(shown, responses, strict=True) for t in (*prompt.expanded_ids, *r.token_ids)]
    return TrainBatch(
        token_ids=torch.tensor(tokens),
        prompt_lengths=torch.tensor([len(prompt.expanded_ids) for prompt in shown]),
        response_lengths=lengths,
        loss_mask=torch.ones(int(lengths.sum()), dtype=torch.bool),
        advantages=signs.repeat_interleave(lengths),
        rollout_logprobs=torch.tensor([x for r in responses for x in r.logprobs]),
        visuals=pixels_of and visuals_of(shown, pixels_of),
    )


def visuals_of(shown: list[Prompt], pixels_of: PixelsOf) -> tuple[tuple[Visual, ...], ...]:
    pixels = {image: cache(partial(pixels_of, image)) for prompt in shown for image in prompt.images}
    return tuple(
        tuple(Visual(pixels[image], span) for image, span in zip(prompt.images, prompt.visual_spans, strict=True))
        for prompt in shown
    )


@torch.no_grad()
def hf_logprobs(folder: Path, batch: TrainBatch) -> Tensor:
    """[N] by transformers, from the exported files, one response at a time."""
    kind: Any = transformers.AutoModelForCausalLM if batch.visuals is None else transformers.AutoModelForImageTextToText
    model = kind.from_pretrained(folder, dtype=torch.float32)
    embedding = model.get_input_embeddings().weight
    totals = (batch.prompt_lengths + batch.response_lengths).tolist()
    said = []
    for i, ids in enumerate(batch.token_ids.split(totals)):
        prompt, sampled, shown = ids[: batch.prompt_lengths[i]], ids[batch.prompt_lengths[i] :], ()
        read = ids
        free = min(set(range(len(embedding))) - set(ids.tolist()))
        its_own = embedding[free].clone()
        if batch.visuals is not None:  # transformers takes a placeholder that was sampled for an image
            shown = batch.visuals[i]
            embedding[free] = embedding[IMAGE]
            read = torch.cat([prompt, sampled.masked_fill(sampled == IMAGE, free)])
        logits = model(read[None], **image_inputs(model, read, shown)).logits[0, len(prompt) - 1 : -1]
        embedding[free] = its_own  # the next sequence may hold it
        said.append(logits.log_softmax(-1).gather(-1, sampled[:, None])[:, 0])
    return torch.cat(said)
