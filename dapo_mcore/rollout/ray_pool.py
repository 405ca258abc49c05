"""Rollout engines in Ray actors, on devices and machines of their own."""

from __future__ import annotations

import contextlib
import heapq
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import ray

from dapo_mcore.config import RayConfig
from dapo_mcore.rollout import ray_cluster
from dapo_mcore.rollout.engine import Finished, Key, Request, Sampling
from dapo_mcore.rollout.ranks import Ranks
from dapo_mcore.rollout.ray_engine import EngineArguments, Task
from dapo_mcore.rollout.ray_member import EngineLost, Member, result
from dapo_mcore.rollout.weight_channel import Sender

if TYPE_CHECKING:
    from torch import Tensor

UNLOADED = -1  # the version of engines that have the weights of the model's folder
REPLY_WAIT_S = 0.5  # how long a poll waits for the first engine that has something to say
WAITING_SHARE = 0.25  # of the sequences an engine decodes together: given to it besides, to follow those that end
BROKEN_OFF_S = 10.0  # for an engine to tell, after a transfer that broke off, that it has everything all the same


class RayPool:
    """Engines in Ray actors that sample for one trainer. Implements `RolloutEngine`.

    Rank 0 deals the requests, each to the engine that owes the fewest tokens, and pushes the weights; the other ranks
    wait. An engine that dies, fails or does not answer within rollout.ray.timeout_s is replaced: what it owed goes to
    the others with the same seeds, so that the responses are the same, and its successor gets the current weights
    before anything else. For that the weights of the last push stay in rank 0's host memory.
    """

    def __init__(self, options: RayConfig, arguments: EngineArguments) -> None:
        """Start the engines. Collective over the torch.distributed world, if there is one.

        Raises:
            RolloutError: the cluster is not there, or an engine did not start.
        """
        self._options = options
        self._arguments = arguments
        self._ranks = Ranks.world()
        self._version = UNLOADED
        self._weights: list[tuple[str, Tensor]] = []  # of the last push
        self._queue: deque[Task] = deque()  # submitted, and with no engine
        self._members: list[Member] = []
        self._finished: list[Finished] = []  # for the next poll
        self._replacements = 0  # since the last push
        self._ranks.together(self._start)

    @property
    def version(self) -> int:
        return self._version

    @property
    def capacity(self) -> int:
        return self._options.num_engines * self._arguments.rollout.max_num_seqs

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """See `RolloutEngine.submit`."""
        self._queue.extend(Task(request, sampling) for request in requests)

    def poll(self) -> list[Finished]:
        """See `RolloutEngine.poll`.

        Raises:
            EngineLost: more than rollout.ray.max_replacements engines were lost since the last push.
            ValueError: an engine refused a request.
        """
        if self._in_flight:
            self._deal()
            self._hear(REPLY_WAIT_S)
            self._push([member for member in self._built if member.version != self._version], self._version)
        finished, self._finished = self._finished, []
        return finished

    def abort(self, keys: Collection[Key]) -> list[Finished]:
        """See `RolloutEngine.abort`."""
        gone, timeout_s = set(keys), self._options.timeout_s
        self._queue = deque(task for task in self._queue if task.request.key not in gone)
        asked = [member for member in self._members if not gone.isdisjoint(member.tasks)]
        requests = {key: task.request for member in asked for key, task in member.tasks.items()}
        for member in asked:
            member.abort([key for key in member.tasks if key in gone], timeout_s)
        partials: list[Finished] = []
        for member in asked:
            with self._replacing(member):
                *before, of_abort = member.read_all(timeout_s)
                for reply in before:
                    self._finished += member.settled(reply)
                partials += [Finished(requests[answer.key], answer.response) for answer in of_abort]
        return partials

    def follow(self) -> None:
        """Wait until the leader releases. Returns at once on rank 0."""
        if not self._leads:
            self._ranks.scatter()

    def release(self) -> None:
        """Let the followers go on. Leader only."""
        self._ranks.scatter([None] * self._ranks.size)

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Push `weights` (HF name, full tensor) to all engines; it is done when all have them. Collective.

        An engine that is lost on the way is replaced, and its successor gets them too.

        Raises:
            RolloutError: a weight is missing or does not fit, or too many engines were lost. The version stays, and
                nothing more is sampled.
        """
        self._ranks.together(lambda: self._load(weights, version))
        self._version = version

    def wake(self) -> None:
        """The engines never sleep: their devices are their own."""

    def sleep(self) -> None:
        """As `wake`."""

    def close(self) -> None:
        """End the engines, and the cluster if it is this run's own. A second time does nothing."""
        if self._members:
            for member in self._members:
                ray.kill(member.actor)
            self._members.clear()
            ray_cluster.disconnect()

    @property
    def _leads(self) -> bool:
        return self._ranks.rank == 0

    @property
    def _in_flight(self) -> bool:
        return bool(self._queue) or any(member.tasks for member in self._members)

    @property
    def _built(self) -> list[Member]:
        return [member for member in self._members if member.version is not None]

    def _start(self) -> None:
        if self._leads:
            ray_cluster.connect(self._options)
            self._members = [self._member(number) for number in range(self._options.num_engines)]
            self._bring_all_to(UNLOADED)

    def _member(self, number: int) -> Member:
        actor = ray_cluster.start_actor(self._options, self._arguments.rollout.tensor_model_parallel_size)
        return Member(number, actor, self._arguments, self._options.start_timeout_s)

    def _load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        if not self._leads:
            deque(weights, maxlen=0)  # gathering them takes every rank
            return
        if self._in_flight:
            raise RuntimeError("requests are in flight: wait for them or abort them before a push")
        self._weights = [(name, tensor.detach().to("cpu", copy=True)) for name, tensor in weights]
        self._replacements = 0
        self._bring_all_to(version)

    def _bring_all_to(self, version: int) -> None:
        """Whoever is lost on the way is replaced, and its successor brought there too."""
        while any(member.version != version for member in self._members):
            self._push([member for member in self._built if member.version != version], version)
            self._hear(REPLY_WAIT_S)

    def _deal(self) -> None:
        """Give what is queued to the engines that have room, and let those that owe anything go on."""
        serving = [m for m in self._members if m.version == self._version and m.takes_calls]
        room = int(self._arguments.rollout.max_num_seqs * (1 + WAITING_SHARE))
        by_debt = [(m.outstanding_tokens, m.number) for m in serving if len(m.tasks) < room]
        heapq.heapify(by_debt)
        dealt: dict[int, list[Task]] = {member.number: [] for member in serving}
        while self._queue and by_debt:
            member = self._members[heapq.heappop(by_debt)[1]]
            dealt[member.number].append(self._queue.popleft())
            member.owe(dealt[member.number][-1])
            if len(member.tasks) < room:
                heapq.heappush(by_debt, (member.outstanding_tokens, member.number))
        for member in serving:
            if member.tasks:
                member.advance(dealt[member.number], self._options.timeout_s)

    def _hear(self, wait_s: float) -> None:
        """Read the replies that are there, after waiting for the first of them; replace those who owe one too long."""
        speakers = {member.next_reply: member for member in self._members if member.next_reply is not None}
        if not speakers:
            return
        ray.wait(list(speakers), num_returns=1, timeout=wait_s)
        heard, silent = ray.wait(list(speakers), num_returns=len(speakers), timeout=0)
        for member in (speakers[reply] for reply in heard):
            with self._replacing(member):
                reply = member.read(self._options.timeout_s)
                if member.version is None:
                    member.version = UNLOADED
                else:
                    self._finished += member.settled(reply)
        for member in (speakers[reply] for reply in silent):
            with self._replacing(member):
                member.refuse_silence()

    def _push(self, members: Sequence[Member], version: int) -> None:
        """Send the weights to `members`. Whoever is lost, or sees the transfer break off, is replaced.

        An engine cannot go on after half an update: its layers have counted some of the elements they wait for.
        """
        present = [member for member in members if self._is_there(member)]
        if not present:
            return
        timeout_s = self._options.timeout_s
        host = ray.util.get_node_ip_address()
        workers = self._arguments.rollout.tensor_model_parallel_size  # of an engine
        sender = Sender(self._weights, receivers=len(present) * workers, host=host, timeout_s=timeout_s)
        calls = [
            member.actor.load.remote(sender.meeting, 1 + place * workers, version)
            for place, member in enumerate(present)
        ]
        try:
            sender.send()
        except RuntimeError:  # of gloo, when one went away: the calls tell which, and the others may wait for ever
            timeout_s = min(BROKEN_OFF_S, timeout_s)
        for member, call in zip(present, calls, strict=True):
            with self._replacing(member):
                result(call, timeout_s)
                member.version = version

    def _is_there(self, member: Member) -> bool:
        """Whether it answers; replaced otherwise. A dead receiver would keep the others waiting at the meeting."""
        with self._replacing(member):
            result(member.actor.ping.remote(), self._options.timeout_s)
            return True
        return False

    @contextlib.contextmanager
    def _replacing(self, member: Member) -> Iterator[None]:
        """When `member` turns out to be lost, another engine takes its place, and what it owed is queued again."""
        try:
            yield
        except EngineLost as reason:
            self._replace(member, reason)

    def _replace(self, member: Member, reason: EngineLost) -> None:
        ray.kill(member.actor)
        self._replacements += 1
        if self._replacements > self._options.max_replacements:
            raise EngineLost(
                f"rollout engine {member.number} was lost ({reason}), and rollout.ray.max_replacements="
                f"{self._options.max_replacements} others since the last push; its log is in Ray's session folder"
            ) from None
        print(f"rollout engine {member.number} was lost ({reason}); another takes its place", flush=True)
        self._queue.extendleft(reversed(member.tasks.values()))
        self._members[member.number] = self._member(member.number)
