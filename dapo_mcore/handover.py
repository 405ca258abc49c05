"""How the policy's weights get into the rollout engine before it samples, and what proves that they did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.policy_model import PolicyModel
from dapo_mcore.batch import routes_of
from dapo_mcore.config import Attest, MegatronConfig, PushMode, RolloutConfig, RunConfig
from dapo_mcore.observe.metrics import Ratio
from dapo_mcore.refuse import refuse
from dapo_mcore.rollout.colocated import ColocatedEngine
from dapo_mcore.rollout.engine import Request, RolloutEngine, Sampling, generate
from dapo_mcore.rollout.leader import is_leader, lead
from dapo_mcore.types import Prompt, Response, TrainBatch
from dapo_mcore.weights.attest import AttestationError
from dapo_mcore.weights.families import language_config
from dapo_mcore.weights.placement import RolloutLayout, TrainLayout
from dapo_mcore.weights.plan import reshard_plan
from dapo_mcore.weights.push import Push

PROBE_RESPONSES, PROBE_LENGTH = 8, 32  # at least one per rank; tokens of the prompt and of each response at most
STRIDE = 7919  # a prime: the probe's prompt is spread over the vocabulary


class Handover:
    """Brings the engine to the policy's version. Every method is collective."""

    def __init__(self, config: RunConfig, policy: Actor, engine: RolloutEngine) -> None:
        """Finds the plan of a direct push, if there is to be one.

        Raises:
            ValueError: weights.push=direct, but the engine cannot be written to.
        """
        self._config = config
        self._policy = policy
        self._engine = engine
        self._load = _way(config, policy, engine)
        self._gaps: dict[str, Ratio] = {}

    def push(self) -> None:
        """Push unless the engine has the policy's version already.

        Raises:
            RolloutError: the push failed or did not arrive whole.
            AttestationError: weights.attest=full, and the engine's log-probabilities are not the policy's.
        """
        if self._engine.version == self._policy.step:
            return
        self._load(self._policy.step)
        if self._config.weights.attest is Attest.full:
            self._gaps = {"weights/probe_gap": self._probe()}

    def metrics(self) -> dict[str, Ratio]:
        """Of the last push."""
        return self._gaps

    def _probe(self) -> Ratio:
        options = self._config.weights
        self._engine.wake()
        gap = probe(self._policy, self._engine, self._config)
        if not gap.value <= options.max_probe_gap:
            raise AttestationError(
                f"after the push of step {self._policy.step} the engine's log-probabilities differ from the policy's "
                f"by {gap.value:.3g} nats on average, above weights.max_probe_gap={options.max_probe_gap}; set "
                "weights.push=reload, and if that does not help compare the model's configuration on both sides"
            )
        return gap


def _way(config: RunConfig, policy: Actor, engine: RolloutEngine) -> Callable[[int], None]:
    def reload(version: int) -> None:
        engine.load(policy.weights(), version)

    mode = config.weights.push
    if mode is PushMode.reload or not isinstance(engine, ColocatedEngine):
        return reload
    layouts = config.actor.megatron, config.rollout
    push = plan_push(*layouts, policy.hf_config, policy.chunks, config.weights.bucket_mb)

    def direct(version: int) -> None:
        policy.gather_parameters()
        engine.write(push, version)

    obstacle = engine.examine(lambda runtime: runtime.obstacle or push.misfit(runtime))
    if not obstacle:
        return direct
    if mode is PushMode.direct:
        refuse("weights.push", "direct", obstacle, "set weights.push=auto or reload")
    if is_leader():
        print(f"weights are pushed through the engine's loader: {obstacle}", flush=True)
    return reload


def plan_push(
    megatron: MegatronConfig, rollout: RolloutConfig, hf_config: Any, chunks: Sequence[PolicyModel], bucket_mb: int
) -> Push:
    """From chunks under one layout into the engines of another. ValueError if the model cannot be cut so."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    train, engines = TrainLayout.of(megatron, ranks), RolloutLayout.of(rollout, ranks)
    return Push(reshard_plan(hf_config, train, engines, chunks[0].vocab_size), hf_config, chunks, bucket_mb)


def probe(policy: Actor, engine: RolloutEngine, config: RunConfig) -> Ratio:
    """Mean distance, in nats per token, of the engine's log-probabilities from the policy's, on a fixed prompt."""
    length = min(PROBE_LENGTH, config.data.max_prompt_length)
    tokens = tuple(1 + STRIDE * place % (language_config(policy.hf_config).vocab_size - 1) for place in range(length))
    prompt = Prompt(0, 0, tokens, "", "")
    count = max(PROBE_RESPONSES, dist.get_world_size() if dist.is_initialized() else 1)
    requests = [Request(prompt, index, seed=index) for index in range(count)]
    most = min(PROBE_LENGTH, config.data.max_response_length)
    sampling = Sampling(temperature=1.0, max_tokens=most, routes=config.actor.moe.router_replay)
    batch = _batch(prompt, lead(lambda: generate(engine, requests, sampling), engine))
    gaps = (policy.logprobs(batch) - batch.rollout_logprobs).abs()
    return Ratio(float(gaps.sum()), len(gaps))


def _batch(prompt: Prompt, responses: list[Response]) -> TrainBatch:
    lengths = torch.tensor([len(response.token_ids) for response in responses])
    total = int(lengths.sum())
    return TrainBatch(
        token_ids=torch.tensor([t for response in responses for t in (*prompt.token_ids, *response.token_ids)]),
        prompt_lengths=torch.full_like(lengths, len(prompt.token_ids)),
        response_lengths=lengths,
        loss_mask=torch.ones(total, dtype=torch.bool),
        advantages=torch.zeros(total),
        rollout_logprobs=torch.tensor([x for response in responses for x in response.logprobs]),
        routes=routes_of(responses),
    )
