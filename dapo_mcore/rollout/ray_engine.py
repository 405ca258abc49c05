"""One rollout engine in a Ray actor: what runs in the actor's process."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from threading import Thread

import ray

from dapo_mcore.config import ModelConfig, RolloutConfig
from dapo_mcore.prompts.vision import ImageTokens
from dapo_mcore.rollout.engine import Answer, Key, Request, Sampling
from dapo_mcore.rollout.vllm_engine import Tokenizer, VllmEngine
from dapo_mcore.rollout.weight_channel import Meeting


@dataclass(frozen=True, slots=True)
class Task:
    request: Request
    sampling: Sampling

    @property
    def tokens(self) -> int:
        """Upper bound of what is read and sampled for it."""
        return self.request.prompt.length + self.sampling.max_tokens


@dataclass(frozen=True, slots=True)
class EngineArguments:
    """What an engine is built from."""

    model: ModelConfig
    rollout: RolloutConfig
    tokenizer: Tokenizer
    max_prompt_length: int
    max_response_length: int
    record_routes: bool
    vision: ImageTokens | None = None


class EngineActor:
    """A `VllmEngine` behind Ray's calls, which are executed in the order of their arrival.

    The engine lives in the actor's own process and decodes within `advance`, so that there is one thing to watch: a
    process that is gone, a call that raises or one that does not return all mean that the engine is lost.
    """

    def build(self, arguments: EngineArguments) -> None:
        """The first call. Raises ValueError as `VllmEngine` does."""
        self._engine = VllmEngine(
            arguments.model,
            arguments.rollout,
            arguments.tokenizer,
            max_prompt_length=arguments.max_prompt_length,
            max_response_length=arguments.max_response_length,
            record_routes=arguments.record_routes,
            vision=arguments.vision,
        )
        if workers := [process.sentinel for process in multiprocessing.active_children()]:
            Thread(target=_end_with_first_of, args=(workers,), daemon=True).start()

    def ping(self) -> None:
        """Returns."""

    def advance(self, tasks: Sequence[Task]) -> list[Answer]:
        """Take `tasks` on, decode for a slice, and say what has finished since the last call."""
        for sampling, same in itertools.groupby(tasks, lambda task: task.sampling):
            self._engine.submit([task.request for task in same], sampling)
        return [finished.answer for finished in self._engine.poll()]

    def abort(self, keys: Collection[Key]) -> list[Answer]:
        """See `RolloutEngine.abort`."""
        return [finished.answer for finished in self._engine.abort(keys)]

    def load(self, meeting: Meeting, first_rank: int, version: int) -> None:
        """Take part in a push as receivers `first_rank` and up."""
        self._engine.receive(meeting, first_rank, ray.util.get_node_ip_address(), version)


def _end_with_first_of(workers: Sequence[int]) -> None:
    """Wait for the first of these processes (sentinels) that ends, and end this one; the others end with it."""
    connection.wait(workers)
    os._exit(1)
