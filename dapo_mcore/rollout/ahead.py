"""Groups that are sampled on rank 0 while every rank trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from dapo_mcore.rollout.collected import Collected
from dapo_mcore.rollout.engine import RolloutEngine
from dapo_mcore.rollout.leader import lead

RunState = Mapping[str, Any]


class SamplingAhead:
    """Collects the groups of a later step in a thread of rank 0.

    The engine must reach its replicas without the other ranks. From `start` on, engine, prompts and grader are the
    thread's; after `wait` they are the caller's again.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        last_step: int,
        collect: Callable[[int], Collected],
        run_state: Callable[[], RunState],
    ) -> None:
        """`collect` gives the groups of a step and `run_state` what a checkpoint holds of the run: on rank 0."""
        self._engine = engine
        self._last_step = last_step
        self._collect = collect
        self._run_state = run_state
        self._thread = ThreadPoolExecutor(1, "sampling-ahead")
        self._pending: list[Future[Collected]] = []  # at most one
        self._state_before: RunState = {}

    def start(self, step: int) -> None:
        """Begin with the groups of `step` under the weights that the engine has; with none behind the last step."""
        lead(lambda: self._start(step))

    def take(self) -> Collected:
        """The groups, once they are complete. Collective.

        Raises:
            StopRun, LeaderError: as `lead` does, for what happened in the thread.
        """
        return lead(lambda: self._pending.pop().result(), self._engine, Collected.trained)

    def wait(self) -> None:
        """Until nothing is sampled. What has gone wrong is for `take` to tell. Collective."""
        lead(self._wait, self._engine)

    def state(self) -> RunState:
        """The run as it was before the groups that nothing was trained on yet: a resumed run samples those again."""
        return self._state_before

    def _start(self, step: int) -> None:
        self._state_before = self._run_state()
        if step <= self._last_step:
            self._pending.append(self._thread.submit(self._collect, step))

    def _wait(self) -> None:
        wait(self._pending)
