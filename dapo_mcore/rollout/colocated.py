"""The rollout engine that lives inside the trainer's processes."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dapo_mcore.config import ModelConfig, RolloutConfig
from dapo_mcore.rollout.engine import Request, Sampling
from dapo_mcore.rollout.ranks import Ranks
from dapo_mcore.rollout.vllm_engine import Tokenizer, VllmEngine
from dapo_mcore.types import Response

if TYPE_CHECKING:
    from torch import Tensor

    from dapo_mcore.rollout.vllm_runtime import RuntimeWeights


@dataclass(frozen=True, slots=True)
class _Share:
    """What a rank is told to sample. None instead of it: go on, the leader has all it wants."""

    requests: Sequence[Request]
    sampling: Sampling


class ColocatedEngine:
    """Replicas of the policy in vLLM, each over `rollout.tensor_model_parallel_size` consecutive ranks.

    Implements `RolloutEngine`. Rank 0 leads: it deals the requests to the replicas, every replica samples its share,
    rank 0 collects. Which replica samples a request does not matter to its response. A failure on any rank is raised
    on all of them as `RolloutError`.
    """

    def __init__(
        self,
        model: ModelConfig,
        rollout: RolloutConfig,
        tokenizer: Tokenizer,
        *,
        max_prompt_length: int,
        max_response_length: int,
        record_routes: bool = False,
    ) -> None:
        """Start the engine of this rank. Collective over the torch.distributed world, if there is one.

        Lengths are in tokens. See `VllmEngine` for what this does to the process.

        Raises:
            ValueError: the tensor-parallel size does not divide the world.
            RolloutError: an engine did not start.
        """
        self._ranks = Ranks.world()
        self._replica_size = rollout.tensor_model_parallel_size
        if self._ranks.size % self._replica_size:
            raise ValueError(
                f"rollout.tensor_model_parallel_size={self._replica_size}: does not divide the {self._ranks.size} "
                "ranks of this run; use a divisor, or start more processes"
            )
        job = self._ranks.scatter([uuid.uuid4().hex] * self._ranks.size)
        self._engine = self._ranks.together(
            lambda: VllmEngine(
                model,
                rollout,
                tokenizer,
                max_prompt_length=max_prompt_length,
                max_response_length=max_response_length,
                job=job,
                record_routes=record_routes,
            )
        )

    @property
    def version(self) -> int:
        return self._engine.version

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        """Responses in the order of `requests`. Leader only.

        Raises:
            RolloutError: sampling failed on some rank; the followers raise the same and serve no longer.
        """
        replicas = self._ranks.size // self._replica_size
        shares = [_Share(requests[replica::replicas], sampling) for replica in range(replicas)]
        by_rank = self._sample(self._ranks.scatter([share for share in shares for _ in range(self._replica_size)]))
        by_replica = by_rank[:: self._replica_size]
        return [by_replica[position % replicas][position // replicas] for position in range(len(requests))]

    def follow(self) -> None:
        """Take part in the leader's `generate` calls until it releases. Returns at once on rank 0.

        Raises:
            RolloutError: sampling failed on some rank.
        """
        if self._ranks.rank == 0:
            return
        while (share := self._ranks.scatter()) is not None:
            self._sample(share)

    def release(self) -> None:
        """Let the followers go on. Leader only, and not after a failure."""
        self._ranks.scatter([None] * self._ranks.size)

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over `weights` (HF name, full tensor), drop every cache. Collective.

        Every rank passes the same names in the same order. Tensors must keep their values until this returns.

        Raises:
            RolloutError: a weight is missing or does not fit, on some rank.
        """
        self._ranks.together(lambda: self._engine.load(weights, version))

    def write(self, push: Callable[[RuntimeWeights], None], version: int) -> None:
        """Let `push` write this rank's part of the weights where it lies; otherwise as `load`. Collective.

        Raises:
            RolloutError: what `push` raised, on some rank.
        """
        self._ranks.together(lambda: self._engine.write(push, version))

    def examine(self, question: Callable[[RuntimeWeights], str]) -> str:
        """The first answer that is not empty to a question about every rank's parameters. Collective."""
        return next(filter(None, self._ranks.all_gather(self._engine.examine(question))), "")

    def wake(self) -> None:
        """After `sleep` and `load`: take the KV cache's memory back. Every rank."""
        self._engine.wake()

    def sleep(self) -> None:
        """Leave the accelerator's memory to the trainer; the weights are lost. Every rank."""
        self._engine.sleep()

    def close(self) -> None:
        """Free the engine, as far as `VllmEngine.close` does."""
        self._engine.close()

    def _sample(self, share: _Share) -> list[list[Response]]:
        """Sample this rank's share; on the leader, every rank's responses (empty but for a replica's first rank)."""
        responses = self._ranks.together(lambda: self._engine.generate(share.requests, share.sampling))
        speaks = self._ranks.rank % self._replica_size == 0
        return self._ranks.gather(responses if speaks else [])
