"""Grades responses in worker processes that are killed at a deadline and replaced.

Verifiers meet text that nobody has seen before: they hang in a power tower, hold the interpreter lock, overflow the
stack, eat memory. None of that may stop the run, and none of it may pass for a wrong answer.
"""

from __future__ import annotations

import selectors
from collections import deque
from collections.abc import Callable, Collection, Sequence
from itertools import count
from socket import socketpair
from threading import Condition, Thread
from time import monotonic
from typing import TYPE_CHECKING, Any

from dapo_mcore.reward.errors import GradingError, VerifierError
from dapo_mcore.reward.process import WorkerDied, WorkerProcess
from dapo_mcore.reward.self_test import Probe, probes_for, refusal
from dapo_mcore.reward.verdicts import failed
from dapo_mcore.types import Outcome, Prompt, Response, Verdict

if TYPE_CHECKING:  # workers import this package: they start faster without omegaconf
    from dapo_mcore.config import RewardConfig

Key = tuple[int, int]  # prompt uid, sample index

WINDOW = 1_024  # responses over which the failure rate is taken; all of one call if these are more
SMALLEST_SAMPLE = 20  # the rate is taken over at least so many responses, so that one hang among three is no verdict


class Grader:
    """A pool of `reward.num_workers` processes that run `reward.verifier`, served by a thread of its own.

    Verdicts come in while the caller does something else. Not for use from several threads at once.
    """

    def __init__(self, options: RewardConfig) -> None:
        self._options = options
        self._recent: list[Verdict] = []
        self._tickets = count()
        # The caller and the thread share what follows, each under this condition.
        self._changed = Condition()
        self._waiting: deque[tuple[int, Probe]] = deque()
        self._keys: dict[int, Key] = {}  # ticket -> key, of all that was submitted and not handed out
        self._graded: dict[int, Verdict] = {}  # by ticket
        self._failure: Exception | None = None  # why the thread has ended
        self._is_closing = False
        # The rest is the thread's, while it runs.
        self._selector = selectors.DefaultSelector()
        self._bell, self._hears = socketpair()
        self._selector.register(self._hears, selectors.EVENT_READ)
        self._workers: list[WorkerProcess] = []
        for _ in range(options.num_workers):
            self._start()
        self._thread = Thread(target=self._serve, name="grader", daemon=True)
        self._thread.start()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_workers(self) -> int:
        return len(self._workers)

    def grade(self, items: Sequence[tuple[Prompt, Response]]) -> list[Verdict]:
        """Verdicts in the order of `items`; nothing else may be queued.

        Raises:
            VerifierError: the verifier cannot be loaded.
            GradingError: more than reward.max_failure_rate of the latest responses got no verdict.
        """
        verdicts = self._run([Probe(response.text, p.answer, p.metadata) for p, response in items])
        self._refuse_failures(verdicts)
        return verdicts

    def submit(self, key: Key, prompt: Prompt, response: Response) -> None:
        """Queue a response; its verdict comes out of `poll`, unless `abort` is told its key before."""
        self._enqueue([(key, Probe(response.text, prompt.answer, prompt.metadata))])

    def poll(self, wait: bool) -> list[tuple[Key, Verdict]]:
        """The verdicts since the last call; with `wait` at least one, if any is outstanding. Raises as `grade` does."""
        verdicts = self._take(wait)
        self._refuse_failures([verdict for _, verdict in verdicts])
        return verdicts

    def abort(self, keys: Collection[Key]) -> None:
        """Forget these. A verifier at work on one goes on, to no effect."""
        with self._changed:
            forgotten = {ticket for ticket, key in self._keys.items() if key in keys}
            self._waiting = deque(entry for entry in self._waiting if entry[0] not in forgotten)
            for ticket in forgotten:
                self._keys.pop(ticket)
                self._graded.pop(ticket, None)

    def self_test(self, prompts: Sequence[Prompt] = ()) -> None:
        """Grades answers known to be right and wrong, some of them made from `prompts`, the way responses are graded.

        Raises:
            VerifierError: the verifier cannot be loaded, fails, or does not tell right from wrong.
        """
        self._wait_until(lambda: all(worker.is_ready for worker in self._workers))
        probes = probes_for(self._options.verifier, prompts)
        if reason := refusal(probes, self._run(probes)):
            raise VerifierError(f"reward.verifier={self._options.verifier}: {reason}")

    def close(self) -> None:
        """Ends the workers; a second call does nothing."""
        if self._is_closing:
            return
        self._is_closing = True
        self._bell.send(b"!")
        self._thread.join()
        for worker in list(self._workers):
            self._stop(worker)
        self._selector.close()
        self._bell.close()
        self._hears.close()

    def _run(self, probes: Sequence[Probe]) -> list[Verdict]:
        verdicts: dict[Key, Verdict] = {}
        self._enqueue([((index, 0), probe) for index, probe in enumerate(probes)])
        try:
            while len(verdicts) < len(probes):
                verdicts |= self._take(wait=True)
        except BaseException:  # half-done work must not answer the next call
            self.close()
            raise
        return [verdicts[index, 0] for index in range(len(probes))]

    def _enqueue(self, items: Sequence[tuple[Key, Probe]]) -> None:
        with self._changed:
            for key, probe in items:
                ticket = next(self._tickets)
                self._keys[ticket] = key
                self._waiting.append((ticket, probe))
        self._bell.send(b"!")

    def _take(self, wait: bool) -> list[tuple[Key, Verdict]]:
        with self._changed:
            self._wait_until(lambda: bool(not wait or self._graded or not self._keys))
            graded, self._graded = self._graded, {}
            return [(self._keys.pop(ticket), verdict) for ticket, verdict in graded.items()]

    def _wait_until(self, holds: Callable[[], bool]) -> None:
        """Raises what has ended the thread, if that has happened."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure or holds())
            if self._failure:
                raise self._failure

    def _serve(self) -> None:
        """The thread."""
        try:
            while not self._is_closing:
                self._attend()
                self._deal()
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller waits and must hear of it
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _deal(self) -> None:
        for worker in [worker for worker in self._workers if worker.is_idle]:
            with self._changed:
                if not self._waiting:
                    return
                ticket, probe = self._waiting.popleft()
            self._assign(worker, ticket, probe)

    def _attend(self) -> None:
        """Takes what the workers sent and replaces those past their deadline, after waiting for either or the bell."""
        wait = min(worker.deadline for worker in self._workers) - monotonic()
        for key, _ in self._selector.select(max(0.0, min(wait, 1e6))):
            if isinstance(key.data, WorkerProcess):
                self._read(key.data)
            else:
                self._hears.recv(1 << 16)
        for worker in [worker for worker in self._workers if worker.deadline <= monotonic()]:
            self._expire(worker)

    def _assign(self, worker: WorkerProcess, ticket: int, probe: Probe) -> None:
        try:
            worker.assign(ticket, probe.response, probe.answer, probe.metadata)
        except WorkerDied as reason:
            self._fail(worker, Outcome.ERROR, str(reason))
        except TimeoutError:
            self._expire(worker)

    def _read(self, worker: WorkerProcess) -> None:
        try:
            reply = worker.read()
        except WorkerDied as reason:
            self._fail(worker, Outcome.ERROR, str(reason))
            return
        if reply is None:
            return
        if "refused" in reply:
            raise VerifierError(reply["refused"])
        ticket = worker.task
        worker.rest()
        if ticket is not None:
            self._keep(ticket, _verdict(reply))
        else:
            with self._changed:
                self._changed.notify_all()

    def _keep(self, ticket: int, verdict: Verdict) -> None:
        with self._changed:
            if ticket in self._keys:
                self._graded[ticket] = verdict
            self._changed.notify_all()

    def _expire(self, worker: WorkerProcess) -> None:
        detail = f"no verdict after reward.timeout_s={self._options.timeout_s:g} s"
        self._fail(worker, Outcome.TIMEOUT, detail)

    def _fail(self, worker: WorkerProcess, outcome: Outcome, detail: str) -> None:
        """Replaces the worker; what it was grading, if anything, is not graded."""
        if not worker.is_ready:
            raise VerifierError(
                f"reward.verifier={self._options.verifier}: a worker process did not start ({detail}); what it printed "
                "stands above"
            )
        self._stop(worker)
        self._start()
        if worker.task is not None:
            self._keep(worker.task, failed(outcome, detail))

    def _start(self) -> None:
        worker = WorkerProcess(self._options.verifier, self._options.timeout_s)
        self._workers.append(worker)
        self._selector.register(worker.channel, selectors.EVENT_READ, worker)

    def _stop(self, worker: WorkerProcess) -> None:
        self._workers.remove(worker)
        self._selector.unregister(worker.channel)
        worker.kill()

    def _refuse_failures(self, verdicts: list[Verdict]) -> None:
        self._recent = [*self._recent, *verdicts][-max(WINDOW, len(verdicts)) :]
        failures = [verdict for verdict in self._recent if verdict.outcome is not Outcome.GRADED]
        rate = self._options.max_failure_rate
        if len(failures) > rate * max(len(self._recent), SMALLEST_SAMPLE):
            timeouts = sum(verdict.outcome is Outcome.TIMEOUT for verdict in failures)
            raise GradingError(
                f"reward.verifier={self._options.verifier} gave no verdict on {len(failures)} of the last "
                f"{len(self._recent)} responses ({timeouts} timeouts, {len(failures) - timeouts} errors), more than "
                f"reward.max_failure_rate={rate:g}; the first: {failures[0].detail}. Mend the verifier, or raise "
                "reward.timeout_s or reward.max_failure_rate"
            )


def _verdict(reply: dict[str, Any]) -> Verdict:
    if "error" in reply:
        return failed(Outcome.ERROR, reply["error"])
    return Verdict(accuracy=reply["accuracy"], score=reply["score"])
