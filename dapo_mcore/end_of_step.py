"""What happens around the updates: validation, checkpoints, metrics, and the end of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dapo_mcore.checkpoint.store import Checkpointed, CheckpointStore
from dapo_mcore.config import TrainerConfig
from dapo_mcore.interruption import Interruption
from dapo_mcore.observe.loggers import Sink
from dapo_mcore.observe.metrics import Ratio, merge
from dapo_mcore.observe.rollouts import write_rollouts
from dapo_mcore.observe.stopwatch import Stopwatch
from dapo_mcore.rollout.collected import Collected
from dapo_mcore.rollout.leader import is_leader
from dapo_mcore.rollout.validation import Validation
from dapo_mcore.types import Group


class Policy(Checkpointed, Protocol):
    step: int  # training steps done; the version of its weights

    def finish_step(self) -> None: ...


@dataclass(frozen=True, slots=True)
class EndOfStep:
    """Every rank calls every method, in the same order; rank 0 writes."""

    options: TrainerConfig
    policy: Policy
    push_weights: Callable[[], None]
    push_metrics: Callable[[], Mapping[str, Ratio]]  # of the last push
    validate: Callable[[], Validation]
    run_state: Callable[[], Mapping[str, Any]]  # of rank 0
    end_sampling: Callable[[], None]  # that goes on while the policy trains
    interruption: Interruption
    checkpoints: CheckpointStore
    export: Callable[[Path], None]
    log: Sink
    stopwatch: Stopwatch
    peak_memory: Callable[[], int]  # bytes of this rank's device, since the process started
    folder: Path

    def before_training(self) -> None:
        """What the policy can do before it is trained: step 0, and with trainer.val_only any other."""
        self.stopwatch.lap()
        step = self.policy.step
        if self.options.val_only or (self.options.val_before_train and step == 0):
            self._write(step, {**self._validate(step), **self.push_metrics()})
        self.interruption.listen()

    def finish(self, step: int, collected: Collected, updates: list[dict[str, Ratio]]) -> None:
        """Count the step, then validate and save when they are due, and write its metrics.

        Raises:
            Interrupted: a rank was asked to end the run.
        """
        self.policy.finish_step()
        self._keep_rollouts(f"train_{step:06d}", collected.groups)
        metrics = merge([*updates, collected.metrics()])
        if self._due(step, self.options.test_freq) or (self.options.test_freq and self._is_last(step)):
            metrics |= self._validate(step)
        self._write(step, {**metrics, **self.push_metrics()}, trained_tokens(collected))
        if not self._is_last(step):
            self.interruption.obey()
        if self._due(step, self.options.save_freq) or self._is_last(step):
            self._save()

    def stopped(self, reason: str) -> None:
        """The run ends before its last step: what it has learned is kept."""
        if is_leader():
            print(f"stopped after step {self.policy.step}: {reason}", flush=True)
        self._save()
        self.end_sampling()

    def end_of_run(self) -> None:
        if self.options.save_hf_model:
            self.export(self.folder / "hf_model")

    def _save(self) -> None:
        save = self.stopwatch.wrap("save", self.checkpoints.save)
        save(self.policy.step, self.policy, self.run_state())

    def _due(self, step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def _is_last(self, step: int) -> bool:
        return step == self.options.total_training_steps

    def _validate(self, step: int) -> dict[str, Ratio]:
        self.push_weights()
        validation = self.validate()
        self._keep_rollouts(f"val_{step:06d}", validation.groups)
        return validation.metrics

    def _keep_rollouts(self, name: str, groups: tuple[Group, ...]) -> None:
        if is_leader():
            write_rollouts(self.folder / "rollouts", name, groups, self.options.rollouts_to_keep)

    def _write(self, step: int, metrics: Mapping[str, Ratio], tokens: int = 0) -> None:
        row = {name: ratio.value for name, ratio in metrics.items()} | self.stopwatch.lap()
        row["perf/max_memory_allocated_gb"] = self.peak_memory() / (1 << 30)  # GiB of rank 0, as verl counts it
        if tokens:
            row["time/tokens_per_s"] = tokens / row["time/step_s"]
        self.log(step, row)


def trained_tokens(collected: Collected) -> int:
    """Prompt and response tokens of the responses a step trains on."""
    return sum(
        group.prompt.length + len(sample.response.token_ids) for group in collected.groups for sample in group.samples
    )
