"""How others fill a batch of passing groups, each as a short driver of its own against the same engines.

A strategy starts a step with nothing in flight and leaves nothing behind; it returns the uids of the groups it commits.
Prompts that were launched are consumed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from dapo_mcore.algo.groups import is_mixed
from dapo_mcore.rollout.engine import Sampling, requests_for
from tools.simulation.engine import SimulatedEngine
from tools.simulation.grader import SimulatedGrader
from tools.simulation.workload import Workload

GEN_BATCHES = 3  # verl's recipe: data.gen_batch_size = 3 x data.train_batch_size
OVER_SAMPLING = 2  # slime's example: over_sampling_batch_size = 2 x rollout_batch_size


@dataclass(slots=True)
class Groups:
    """Groups in flight, graded as their responses finish."""

    engine: SimulatedEngine
    grader: SimulatedGrader
    workload: Workload
    sampling: Sampling
    _uids: count[int] = field(default_factory=count)
    _accuracies: dict[int, list[float]] = field(default_factory=dict)  # of the groups in flight

    def __len__(self) -> int:
        return len(self._accuracies)

    def launch(self, number: int) -> None:
        prompts = [self.workload.prompt(next(self._uids)) for _ in range(number)]
        self._accuracies |= {prompt.uid: [] for prompt in prompts}
        requests = requests_for(prompts, self.workload.group_size, self.workload.seed, self.engine.version)
        self.engine.submit(requests, self.sampling)

    def wait(self) -> dict[int, bool]:
        """The next groups that are complete, in the order they were completed: uid -> passes."""
        decided: dict[int, bool] = {}
        while self._accuracies and not decided:
            finished = self.engine.poll()
            for one in finished:
                self.grader.submit(one.request.key, one.request.prompt, one.response)
            for (uid, _), verdict in self.grader.poll(wait=not finished):
                self._accuracies[uid].append(verdict.accuracy)
                if len(self._accuracies[uid]) == self.workload.group_size:
                    decided[uid] = is_mixed(self._accuracies.pop(uid))
        return decided

    def drain(self) -> dict[int, bool]:
        decided: dict[int, bool] = {}
        while self._accuracies:
            decided |= self.wait()
        return decided

    def abort(self) -> None:
        keys = [(uid, index) for uid in self._accuracies for index in range(self.workload.group_size)]
        self.engine.abort(keys)
        self.grader.abort(keys)
        self._accuracies.clear()


Strategy = Callable[[Groups, int], list[int]]


def full_batch_refill(groups: Groups, wanted: int) -> list[int]:
    """Whole generation batches, each waited for to its last straggler; the surplus is cut in prompt order (verl)."""
    accepted: list[int] = []
    while len(accepted) < wanted:
        groups.launch(GEN_BATCHES * wanted)
        accepted += sorted(uid for uid, passes in groups.drain().items() if passes)
    return accepted[:wanted]


def one_for_one(groups: Groups, wanted: int) -> list[int]:
    """As many groups in flight as are missing: each that fails is replaced by one other (OpenRLHF)."""
    accepted: list[int] = []
    groups.launch(wanted)
    while len(accepted) < wanted:
        decided = groups.wait()
        accepted += [uid for uid, passes in decided.items() if passes]
        groups.launch(sum(not passes for passes in decided.values()))
    return accepted


def first_finished(groups: Groups, wanted: int) -> list[int]:
    """The first passing groups to finish; over-sampled whenever too few are accepted or in flight (slime)."""
    accepted: list[int] = []
    while len(accepted) < wanted:
        if len(accepted) + len(groups) < wanted:
            groups.launch(OVER_SAMPLING * wanted)
        accepted += [uid for uid, passes in groups.wait().items() if passes]
    groups.abort()
    return accepted[:wanted]


PEERS: dict[str, Strategy] = {
    "full_batch_refill": full_batch_refill,
    "one_for_one": one_for_one,
    "first_finished": first_finished,
}
