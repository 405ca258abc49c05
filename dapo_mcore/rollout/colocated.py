"""The rollout engine that lives inside the trainer's processes."""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dapo_mcore.config import ModelConfig, RolloutConfig
from dapo_mcore.rollout.engine import Answer, Finished, Key, Request, Sampling
from dapo_mcore.rollout.ranks import Ranks, RolloutError
from dapo_mcore.rollout.vllm_engine import Tokenizer, VllmEngine

if TYPE_CHECKING:
    from torch import Tensor

    from dapo_mcore.prompts.vision import ImageTokens
    from dapo_mcore.rollout.vllm_runtime import RuntimeWeights

LOAD = 1.25  # requests dealt to a replica per response that it decodes: what ends within a slice is replaced there


@dataclass(frozen=True, slots=True)
class _Order:
    """What a rank is told to do with its replica. None instead of it: go on, the leader has all it wants."""

    requests: Sequence[Request] = ()
    sampling: Sampling | None = None  # of the requests
    gone: frozenset[Key] = frozenset()  # requests to abort, before anything else
    decode: bool = True


class ColocatedEngine:
    """Replicas of the policy in vLLM, each over `rollout.tensor_model_parallel_size` consecutive ranks.

    Implements `RolloutEngine`. Rank 0 leads and keeps the queue: the next prompt's requests go to the replica that has
    the fewest, as soon as one has room. All replicas decode slices of equally many steps, with one exchange between
    them. Which replica samples a request does not matter to its response. A failure on any rank is raised on all of
    them as `RolloutError`; what was in flight is forgotten then.
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
        vision: ImageTokens | None = None,
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
        self._queue: deque[tuple[Request, Sampling]] = deque()  # on the leader, like all that follows
        replicas = self._ranks.size // self._replica_size
        self._dealt: list[dict[Key, Request]] = [{} for _ in range(replicas)]
        self._room = rollout.max_num_seqs * LOAD
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
                vision=vision,
            )
        )

    @property
    def version(self) -> int:
        return self._engine.version

    @property
    def capacity(self) -> int:
        """Responses decoded together by all replicas."""
        return self._engine.capacity * len(self._dealt)

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Queue `requests`. Leader only."""
        self._queue.extend((request, sampling) for request in requests)

    def poll(self) -> list[Finished]:
        """What the replicas finish within a slice. Leader only.

        Raises:
            RolloutError: sampling failed on some rank; the followers raise the same and serve no longer.
        """
        orders = self._deal()
        return self._exchange(orders) if any(self._dealt) else []

    def abort(self, keys: Collection[Key]) -> list[Finished]:
        """Forget these; what those that had begun have sampled so far. Leader only.

        Raises:
            RolloutError: as `poll`.
        """
        gone = frozenset(keys)
        self._queue = deque(entry for entry in self._queue if entry[0].key not in gone)
        orders = [_Order(gone=gone & dealt.keys(), decode=False) for dealt in self._dealt]
        return self._exchange(orders) if any(order.gone for order in orders) else []

    def follow(self) -> None:
        """Take part in what the leader does until it releases. Returns at once on rank 0.

        Raises:
            RolloutError: sampling failed on some rank.
        """
        if self._ranks.rank == 0:
            return
        while (order := self._ranks.scatter()) is not None:
            self._obey(order)

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

    def _deal(self) -> list[_Order]:
        """Every replica's next requests. Those of a prompt stay together: it is then read once."""
        shares: list[list[Request]] = [[] for _ in self._dealt]
        sampling = self._queue[0][1] if self._queue else None
        while self._queue and self._queue[0][1] == sampling:
            replica = min(range(len(shares)), key=lambda number: len(self._dealt[number]))
            if len(self._dealt[replica]) >= self._room:
                break
            uid = self._queue[0][0].prompt.uid
            while self._queue and self._queue[0][0].prompt.uid == uid and self._queue[0][1] == sampling:
                request, _ = self._queue.popleft()
                shares[replica].append(request)
                self._dealt[replica][request.key] = request
        return [_Order(share, sampling) for share in shares]

    def _exchange(self, orders: Sequence[_Order]) -> list[Finished]:
        """Have every rank of a replica carry out its order; what came out."""
        order = self._ranks.scatter([order for order in orders for _ in range(self._replica_size)])
        try:
            by_rank = self._obey(order)
        except RolloutError:
            self._queue.clear()
            self._dealt = [{} for _ in self._dealt]
            raise
        finished = [
            Finished(dealt.pop(answer.key), answer.response)
            for dealt, answers in zip(self._dealt, by_rank[:: self._replica_size], strict=True)
            for answer in answers
        ]
        self._dealt = [
            {key: request for key, request in dealt.items() if key not in order.gone}
            for dealt, order in zip(self._dealt, orders, strict=True)
        ]
        return finished

    def _obey(self, order: _Order) -> list[list[Answer]]:
        """Carry out this rank's order; on the leader, every rank's answers (none but from a replica's first rank)."""
        try:
            finished = self._ranks.together(lambda: self._carry_out(order))
        except RolloutError:
            self._engine.clear()
            raise
        speaks = self._ranks.rank % self._replica_size == 0
        return self._ranks.gather([one.answer for one in finished] if speaks else [])

    def _carry_out(self, order: _Order) -> list[Finished]:
        aborted = self._engine.abort(order.gone) if order.gone else []
        if order.sampling is not None and order.requests:
            self._engine.submit(order.requests, order.sampling)
        return aborted + (self._engine.poll() if order.decode else [])
