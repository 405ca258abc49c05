"""Rollout engines with continuous batching under a virtual clock, simulated event by event.

While a replica's batch does not change, each of its sequences gets one token per step and a step takes a constant time:
the next thing that happens is known without going through the tokens. A prefill holds the whole replica up.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import inf

from dapo_mcore.rollout.engine import Finished, Key, Request, Sampling
from dapo_mcore.types import Response
from tools.simulation.workload import Workload

SLICE_S = 0.25  # virtual seconds that a poll goes on decoding after the first response has finished
ROUNDING = 1e-6  # steps


@dataclass(slots=True)
class Clock:
    """Virtual seconds."""

    now: float = 0.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one replica: about a 30B mixture of experts with 3B active parameters on one H200, in bf16."""

    step_s: float = 0.006  # of an engine step, whatever the batch
    sequence_s: float = 90e-6  # added per sequence of the batch
    prefill_s: float = 20e-6  # per prompt token
    max_num_seqs: int = 256


@dataclass(frozen=True, slots=True)
class Running:
    request: Request
    response: Response
    started: float  # steps the replica had done

    @property
    def ends(self) -> float:
        """Steps the replica will have done."""
        return self.started + len(self.response.token_ids)


@dataclass(slots=True)
class Replica:
    cost: Cost
    time: float = 0.0  # up to which `steps` counts
    steps: float = 0.0
    prefill: float = 0.0  # seconds still to be spent before the next step
    running: dict[Key, Running] = field(default_factory=dict)
    ends: list[tuple[float, Key]] = field(default_factory=list)  # heap; may name what was aborted

    @property
    def step_s(self) -> float:
        return self.cost.step_s + self.cost.sequence_s * len(self.running)

    def advance(self, now: float) -> None:
        """Count the steps up to `now`, before which no sequence ends."""
        held_up = min(self.prefill, now - self.time)
        self.prefill -= held_up
        if self.running:
            self.steps += (now - self.time - held_up) / self.step_s
        self.time = now

    def next_end(self) -> float:
        """When the next sequence ends; infinity when there is none."""
        while self.ends and self.ends[0][1] not in self.running:
            heapq.heappop(self.ends)
        if not self.ends:
            return inf
        return self.time + self.prefill + max(0.0, self.ends[0][0] - self.steps) * self.step_s

    def admit(self, request: Request, response: Response) -> None:
        entry = Running(request, response, self.steps)
        self.running[request.key] = entry
        heapq.heappush(self.ends, (entry.ends, request.key))
        self.prefill += self.cost.prefill_s * len(request.prompt.token_ids)

    def pop_ended(self) -> list[Running]:
        ended: list[Running] = []
        while self.ends and self.ends[0][0] <= self.steps + ROUNDING:
            _, key = heapq.heappop(self.ends)
            if key in self.running:
                ended.append(self.running.pop(key))
        return ended


class SimulatedEngine:
    """Many replicas behind one queue; the next request goes to the replica with the fewest. A `Decoder`."""

    def __init__(self, workload: Workload, replicas: int, cost: Cost, clock: Clock) -> None:
        self.version = 0
        self.capacity = replicas * cost.max_num_seqs
        self.generated_tokens = 0  # of everything ever sampled, what was aborted included
        self.launched: set[int] = set()  # uids of the prompts submitted under this version
        self._workload, self._cost, self._clock = workload, cost, clock
        self._replicas = [Replica(cost) for _ in range(replicas)]
        self._queue: deque[Request] = deque()
        self._finished: list[Finished] = []
        self._places: dict[Key, int] = {}  # running request -> replica
        self._loads = [(0, number) for number in range(replicas)]  # heap; an entry holds while the load is the one told
        self._events: list[tuple[float, int]] = []  # heap; an entry holds while it is the one in _next
        self._next = [inf] * replicas

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        self._advance(self._clock.now)
        self._queue.extend(requests)
        self.launched.update(request.prompt.uid for request in requests)
        self._dispatch()

    def poll(self) -> list[Finished]:
        """What has finished by now; if nothing has, the clock goes on to the next response and a slice further."""
        self._advance(self._clock.now)
        if not self._finished and self._peek() < inf:
            self._advance(self._peek() + SLICE_S)
        finished, self._finished = self._finished, []
        return finished

    def abort(self, keys: Collection[Key]) -> list[Finished]:
        self._advance(self._clock.now)
        forgotten = set(keys)
        self._finished = [finished for finished in self._finished if finished.request.key not in forgotten]
        self._queue = deque(request for request in self._queue if request.key not in forgotten)
        for number in {self._places[key] for key in forgotten if key in self._places}:
            self._replicas[number].advance(self._clock.now)
        for key in forgotten & self._places.keys():
            number = self._places.pop(key)
            replica = self._replicas[number]
            entry = replica.running.pop(key)
            self.generated_tokens += int(replica.steps - entry.started)
            self._schedule(number)
        self._dispatch()
        return []

    def load(self, weights: object, version: int) -> None:
        self.version = version
        self.launched = set()

    def _advance(self, until: float) -> None:
        while self._peek() <= until:
            now, number = heapq.heappop(self._events)
            replica = self._replicas[number]
            replica.advance(now)
            for entry in replica.pop_ended():
                key = entry.request.key
                del self._places[key]
                self.generated_tokens += len(entry.response.token_ids)
                self._finished.append(Finished(entry.request, entry.response))
            self._clock.now = now
            self._schedule(number)
            self._dispatch()
        self._clock.now = until

    def _peek(self) -> float:
        """When the next sequence of any replica ends."""
        while self._events and self._events[0][0] != self._next[self._events[0][1]]:
            heapq.heappop(self._events)
        return self._events[0][0] if self._events else inf

    def _dispatch(self) -> None:
        """While anything waits, every replica with room is given some."""
        while self._queue:
            load, number = self._loads[0]
            replica = self._replicas[number]
            if load != len(replica.running):
                heapq.heappop(self._loads)
            elif load == self._cost.max_num_seqs:
                return
            else:
                self._admit(self._queue.popleft(), number)

    def _admit(self, request: Request, number: int) -> None:
        replica = self._replicas[number]
        replica.advance(self._clock.now)
        replica.admit(request, self._workload.response(self.version, request.prompt.uid, request.index))
        self._places[request.key] = number
        self._schedule(number)

    def _schedule(self, number: int) -> None:
        """After every change of a replica's batch."""
        replica = self._replicas[number]
        heapq.heappush(self._loads, (len(replica.running), number))
        self._next[number] = replica.next_end()
        if self._next[number] < inf:
            heapq.heappush(self._events, (self._next[number], number))
