"""The reference model: the policy before training, frozen, under the policy's layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from dapo_mcore.actor.build import build_chunks, read_hf_config, transformer_config
from dapo_mcore.actor.offload import Parked, park, unpark
from dapo_mcore.actor.policy_model import PolicyModel
from dapo_mcore.actor.routing import Routing
from dapo_mcore.actor.scorer import Scorer
from dapo_mcore.actor.vision.model import VisionPolicyModel
from dapo_mcore.config import ActorConfig, ModelConfig, RefConfig
from dapo_mcore.types import TrainBatch
from dapo_mcore.weights import load_hf
from dapo_mcore.weights.families import language_config


class Reference:
    """Scores batches with weights that never change. Collective."""

    def __init__(self, chunks: list[torch.nn.Module], scorer: Scorer, routing: Routing, offload: bool) -> None:
        self._chunks, self._scorer, self._routing, self._offload = chunks, scorer, routing, offload
        self._parked = self._rest()

    def score(self, batch: TrainBatch, responses_per_update: int) -> TrainBatch:
        """The batch with ref_logprobs of its trained tokens, in the packing of the updates."""
        unpark(self._parked)
        logprobs = self._scorer.logprobs_of_updates(batch, responses_per_update)
        self._routing.finish()  # refuses choices that were not replayed
        self._parked = self._rest()
        return replace(batch, ref_logprobs=logprobs)

    def _rest(self) -> list[Parked]:
        return park(weight for chunk in self._chunks for weight in chunk.parameters()) if self._offload else []


def build_reference(
    model: ModelConfig, actor: ActorConfig, ref: RefConfig, policy: Sequence[PolicyModel] = ()
) -> Reference:
    """From `model.path`, whatever checkpoint the policy continues from.

    Megatron's groups must exist (`parallel.init_model_parallel`).

    Args:
        policy: the policy's chunks, as it continues: where both see with the same frozen tower, there is one.
    """
    hf = read_hf_config(model.path)
    config = transformer_config(hf, actor.megatron, model.dtype)
    chunks = build_chunks(hf, config)
    load_hf(chunks, model.path, hf)
    routing = Routing(chunks, config, actor.moe)
    frozen: list[torch.nn.Module] = [chunk.requires_grad_(False).eval() for chunk in chunks]
    for chunk, of_policy in zip(frozen, policy, strict=False):
        if isinstance(chunk, VisionPolicyModel) and isinstance(of_policy, VisionPolicyModel):
            chunk.share_tower(of_policy)
    scorer = Scorer(frozen, config, language_config(hf).vocab_size, actor.ppo_max_token_len_per_gpu)
    return Reference(frozen, scorer, routing, ref.param_offload)
