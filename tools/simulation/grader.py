"""A grader whose verdicts come after a virtual delay."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from dapo_mcore.rollout.engine import Key
from dapo_mcore.types import Prompt, Response, Verdict
from tools.simulation.engine import Clock

GRADING_S = 0.1


@dataclass(slots=True)
class SimulatedGrader:
    """As many workers as it takes. A right response says so."""

    clock: Clock
    _pending: deque[tuple[float, Key, Verdict]] = field(default_factory=deque)

    def submit(self, key: Key, prompt: Prompt, response: Response) -> None:
        self._pending.append((self.clock.now + GRADING_S, key, judge(prompt, response)))

    def poll(self, wait: bool) -> list[tuple[Key, Verdict]]:
        """Verdicts that are there by now; waiting moves the clock to the next one."""
        if wait and self._pending:
            self.clock.now = max(self.clock.now, self._pending[0][0])
        ready: list[tuple[Key, Verdict]] = []
        while self._pending and self._pending[0][0] <= self.clock.now:
            _, key, verdict = self._pending.popleft()
            ready.append((key, verdict))
        return ready

    def grade(self, items: Sequence[tuple[Prompt, Response]]) -> list[Verdict]:
        return [judge(prompt, response) for prompt, response in items]

    def abort(self, keys: Collection[Key]) -> None:
        forgotten = set(keys)
        self._pending = deque(entry for entry in self._pending if entry[1] not in forgotten)


def judge(prompt: Prompt, response: Response) -> Verdict:
    is_right = response.text == prompt.answer
    return Verdict(accuracy=float(is_right), score=1.0 if is_right else -1.0)
