"""What the pool knows of one engine actor: the calls it made, the requests it owes, whether it still answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from time import monotonic
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from dapo_mcore.rollout.engine import Answer, Finished, Key
from dapo_mcore.rollout.ray_engine import EngineArguments, Task

CALLS_AHEAD = 2  # an actor goes on with the second while the pool looks at the reply to the first


class EngineLost(RuntimeError):
    """An engine is gone, failed, or did not answer in time; the message says which."""


class Member:
    """One engine actor, from its start on. It replies in the order of the calls."""

    def __init__(self, number: int, actor: Any, arguments: EngineArguments, start_timeout_s: float) -> None:
        """Let `actor` build its engine."""
        self.number = number
        self.actor = actor
        self.version: int | None = None  # of its weights; None: it is still being built
        self.tasks: dict[Key, Task] = {}  # given to it and not yet answered
        self.outstanding_tokens = 0  # upper bound of what it has still to read and to sample
        self._replies: deque[Any] = deque([actor.build.remote(arguments)])
        self._deadline = monotonic() + start_timeout_s

    @property
    def next_reply(self) -> Any | None:
        """The reference of the reply that comes next; None: nothing was asked."""
        return self._replies[0] if self._replies else None

    @property
    def takes_calls(self) -> bool:
        return len(self._replies) < CALLS_AHEAD

    def owe(self, task: Task) -> None:
        """The request of `task` is this engine's; `advance` tells it so."""
        self.tasks[task.request.key] = task
        self.outstanding_tokens += task.tokens

    def advance(self, tasks: Sequence[Task], timeout_s: float) -> None:
        """Let it take `tasks` on and decode for a slice."""
        self._call(self.actor.advance, timeout_s, tasks)

    def abort(self, keys: Collection[Key], timeout_s: float) -> None:
        """Let it forget these requests, all of them its own."""
        for key in keys:
            self._settle(key)
        self._call(self.actor.abort, timeout_s, keys)

    def read(self, timeout_s: float) -> Any:
        """The reply that comes next, within `timeout_s`; the calls behind it have that long from then on.

        Raises:
            EngineLost: there is none, or an error instead.
            ValueError: it refused a request.
        """
        reply = result(self._replies.popleft(), timeout_s)
        self._deadline = monotonic() + timeout_s
        return reply

    def read_all(self, timeout_s: float) -> list[Any]:
        """All replies that it owes, each within `timeout_s`; raises like `read`."""
        return [self.read(timeout_s) for _ in range(len(self._replies))]

    def refuse_silence(self) -> None:
        """Raises EngineLost when the reply that comes next should have been there."""
        if monotonic() > self._deadline:
            built = self.version is not None
            raise EngineLost("no answer in time" if built else "not built in time; has the cluster room for it?")

    def settled(self, reply: Sequence[Answer]) -> list[Finished]:
        """What of a reply answers a request it owes. An answer to a request aborted meanwhile does not."""
        mine = [answer for answer in reply if self._owes(answer)]
        return [Finished(self._settle(answer.key).request, answer.response) for answer in mine]

    def _owes(self, answer: Answer) -> bool:
        task = self.tasks.get(answer.key)
        return task is not None and task.request.seed == answer.seed

    def _settle(self, key: Key) -> Task:
        task = self.tasks.pop(key)
        self.outstanding_tokens -= task.tokens
        return task

    def _call(self, method: Any, timeout_s: float, argument: Any) -> None:
        if not self._replies:
            self._deadline = monotonic() + timeout_s
        self._replies.append(method.remote(argument))


def result(reference: Any, timeout_s: float) -> Any:
    """What a call to an engine returned.

    Raises:
        EngineLost: the engine died, failed, or did not answer in so many seconds.
        ValueError: it refused what it was asked; another engine would do the same.
    """
    try:
        return ray.get(reference, timeout=timeout_s)
    except GetTimeoutError:
        raise EngineLost("no answer in time") from None
    except RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise error.cause from None
        raise EngineLost(f"{type(error.cause).__name__}: {error.cause}") from None
    except RayError as error:
        raise EngineLost(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from None
