"""What each rank of the push tests does: train, push by a plan, sample; then sample from a freshly loaded engine."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from dapo_mcore.actor import parallel
from dapo_mcore.actor.actor import Actor, build_actor
from dapo_mcore.config import (
    ActorConfig,
    Attest,
    DataConfig,
    MegatronConfig,
    OptimConfig,
    PushMode,
    RolloutConfig,
    RunConfig,
    WeightsConfig,
)
from dapo_mcore.handover import Handover, plan_push, probe
from dapo_mcore.rollout.colocated import ColocatedEngine
from dapo_mcore.rollout.engine import Request, Sampling, generate
from dapo_mcore.rollout.leader import lead
from dapo_mcore.rollout.ranks import RolloutError
from dapo_mcore.types import Response, TrainBatch
from dapo_mcore.weights import save_hf
from dapo_mcore.weights.attest import Attestation, AttestationError
from dapo_mcore.weights.itinerary import LayerOfEngine
from dapo_mcore.weights.push import Push, RuntimeWeights
from tests.e2e.tiny_policies import LENGTHS, VOCAB, Letters, model_config, rollout_config
from tools.certificate.layouts import megatron_config

TRAINING = {"optim": OptimConfig(lr=3e-2, clip_grad=1e9), "ppo_max_token_len_per_gpu": 256}


@dataclass(frozen=True)
class Case:
    family: str  # of tiny_policies
    megatron: dict[str, Any]  # short names of layouts
    rollout: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)  # of the model, others than tiny_policies has

    @property
    def rollout_config(self) -> RolloutConfig:
        return rollout_config(**self.rollout)


def batch(seed: int) -> TrainBatch:
    """Four responses of random tokens, to be learned by heart."""
    prompt, response, count = 6, 10, 4
    draw = torch.Generator().manual_seed(seed)
    total = count * response
    return TrainBatch(
        token_ids=torch.randint(1, VOCAB, (count * (prompt + response),), generator=draw),
        prompt_lengths=torch.full((count,), prompt),
        response_lengths=torch.full((count,), response),
        loss_mask=torch.ones(total, dtype=torch.bool),
        advantages=torch.ones(total),
        rollout_logprobs=torch.full((total,), -4.0),
    )


def sample(engine: ColocatedEngine, requests: list[Request], sampling: Sampling) -> list[Response]:
    return lead(lambda: generate(engine, requests, sampling), engine)


def actor_of(folder: Path, megatron: MegatronConfig) -> Actor:
    parallel.init_model_parallel(megatron, seed=0)
    return build_actor(model_config(folder), ActorConfig(megatron=megatron, **TRAINING), total_steps=10)


def pushed_and_fresh(case: Case, folder: Path, requests: list[Request], sampling: Sampling) -> dict[str, Any]:
    """Responses before training, after three steps and pushes, and of an engine loaded from the exported policy."""
    policy, engine, push = start(case, folder)
    answers: dict[str, Any] = {"before": sample(engine, requests, sampling)}
    train_and_push(policy, engine, push)
    answers["pushed"] = sample(engine, requests, sampling)
    save_hf(policy.weights(), policy.hf_config, folder, folder / "exported")
    fresh = ColocatedEngine(model_config(folder / "exported"), case.rollout_config, Letters(), **LENGTHS)
    answers["fresh"] = sample(fresh, requests, sampling)
    return answers


def start(case: Case, folder: Path) -> tuple[Actor, ColocatedEngine, Push]:
    parallel.destroy_model_parallel()
    megatron = megatron_config(**case.megatron)
    policy = actor_of(folder, megatron)
    engine = ColocatedEngine(model_config(folder), case.rollout_config, Letters(), **LENGTHS)
    return policy, engine, plan_push(megatron, case.rollout_config, policy.hf_config, policy.chunks, bucket_mb=1)


def train_and_push(policy: Actor, engine: ColocatedEngine, push: Push) -> None:
    for step in (1, 2, 3):
        policy.update(batch(step))
        policy.finish_step()
        policy.gather_parameters()
        engine.write(push, policy.step)


def one_after_another(
    cases: dict[str, Case], folder: Path, requests: list[Request], sampling: Sampling
) -> dict[str, dict[str, Any]]:
    return {name: pushed_and_fresh(case, folder / name, requests, sampling) for name, case in cases.items()}


def error_of(action: Any) -> str:
    try:
        action()
    except (RolloutError, AttestationError, ValueError) as error:
        return str(error)
    return ""


class CorruptsAByte(Push):
    """On rank 1 one bit of what came in changes before it is unpacked."""

    def _slots(self, bucket: Tensor, numbers: Sequence[int]) -> list[Tensor]:
        if self._rank == 1:
            bucket.view(torch.uint8)[5] ^= 16  # of what goes out it is overwritten
        return super()._slots(bucket, numbers)


class SkipsATensor(Push):
    """A tensor that stays on rank 0 is forgotten there, with all that would count it."""

    def _complete(self, layer: LayerOfEngine, runtime: RuntimeWeights, attestation: Attestation) -> None:
        named = self._declared[self._pieces[layer.copies[0]].parameter].hf_forms[0].names if layer.copies else ()
        is_norm = named == ("model.layers.0.input_layernorm.weight",)
        copies = layer.copies[1:] if is_norm and self._rank == 0 else layer.copies
        super()._complete(replace(layer, copies=copies), runtime, attestation)


class ExchangesExperts(Push):
    """The policy's first two experts are taken for each other, when read and when attested."""

    def _find_sources(self) -> None:
        super()._find_sources()
        for number, piece in enumerate(self._pieces):
            if piece.expert == 0 and number in self._sources:
                twin = self._pieces.index(replace(piece, expert=1))
                self._sources[number], self._sources[twin] = self._sources[twin], self._sources[number]


def faults_and_leaks(case: Case, folder: Path) -> dict[str, Any]:
    """What a push says when something goes wrong on the way, and what twenty of them leave behind."""
    policy, engine, push = start(case, folder)
    arguments = (push._plan, policy.hf_config, policy.chunks, 1)
    answers: dict[str, Any] = {
        "byte": error_of(lambda: engine.write(CorruptsAByte(*arguments), 1)),
        "tensor": error_of(lambda: engine.write(SkipsATensor(*arguments), 1)),
        "version": engine.version,
        "exchanged": error_of(lambda: engine.write(ExchangesExperts(*arguments), 1)),
        "gap exchanged": probe(policy, engine, RunConfig(data=DataConfig(**LENGTHS))).value,
        "whole": error_of(lambda: engine.write(push, 2)),
        "gap": probe(policy, engine, RunConfig(data=DataConfig(**LENGTHS))).value,
    }
    resident = []
    for _ in range(20):
        engine.write(push, 3)
        resident.append(psutil.Process().memory_info().rss)
    return answers | {"resident": resident, **chosen_ways(case, policy, engine)}


def chosen_ways(case: Case, policy: Actor, engine: ColocatedEngine) -> dict[str, Any]:
    """What a handover says to a bound that no probe keeps, and to an engine that packs one layer in a private way."""
    layer = "model.layers.1.self_attn.o_proj"

    def repack(runtime: Any) -> str:
        runtime.model.get_submodule(layer).cpu_linear = torch.nn.functional.linear  # as where oneDNN refuses a layer
        return ""

    def handover(**weights: Any) -> Handover:
        actor = ActorConfig(megatron=megatron_config(**case.megatron))
        options = {"actor": actor, "rollout": case.rollout_config, "data": DataConfig(**LENGTHS)}
        return Handover(RunConfig(weights=WeightsConfig(**weights), **options), policy, engine)

    answers: dict[str, Any] = {"unlike": error_of(handover(attest=Attest.full, max_probe_gap=1e-12).push)}
    engine.examine(repack)
    answers["direct"] = error_of(lambda: handover(push=PushMode.direct))
    printed = io.StringIO()
    with redirect_stdout(printed):
        fallen_back = handover(attest=Attest.full, max_probe_gap=1e-4)
    answers["auto"] = printed.getvalue()
    engine.write(lambda _: None, policy.step + 1)  # so that it is not up to date
    fallen_back.push()
    answers["reloaded"] = engine.version, fallen_back.metrics()["weights/probe_gap"].value
    answers["packed anew"] = error_of(lambda: handover(push=PushMode.direct))
    return answers


def stale_expert_map(case: Case, folder: Path, requests: list[Request], sampling: Sampling) -> dict[str, Any]:
    """A push as it should be; one into an engine whose map was rotated on rank 1; and one after that was mended."""

    def rotate(runtime: Any) -> str:
        layer = runtime._layer("model.layers.1.mlp.experts.routed_experts.w2_weight")
        if dist.get_rank() == 1:
            layer._expert_map.copy_(layer._expert_map.roll(1))
        return ""

    answers = pushed_and_fresh(case, folder, requests, sampling)
    policy, engine, push = start(case, folder)
    engine.examine(rotate)
    answers["stale"] = error_of(lambda: engine.write(push, 1))
    for _ in range(policy.hf_config.num_experts - 1):
        engine.examine(rotate)
    return answers | {"mended": error_of(lambda: engine.write(push, 2)), "messages": len(push._round_numbers)}
