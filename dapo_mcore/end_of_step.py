"""What happens around the updates: validation, checkpoints, metrics, and the end of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dapo_mcore.checkpoint.store import Checkpointed, CheckpointStore
from dapo_mcore.config import TrainerConfig
from dapo_mcore.observe.loggers import Sink
from dapo_mcore.observe.metrics import Ratio, merge
from dapo_mcore.observe.rollouts import write_rollouts
from dapo_mcore.observe.stopwatch import Stopwatch
from dapo_mcore.rollout.engine import RolloutEngine
from dapo_mcore.rollout.leader import is_leader, lead
from dapo_mcore.rollout.sampler import Collected
from dapo_mcore.rollout.validation import Validation


class Policy(Checkpointed, Protocol):
    step: int  # training steps done; the version of its weights

    def finish_step(self) -> None: ...


@dataclass(frozen=True, slots=True)
class EndOfStep:
    """Collective: every rank calls every method; rank 0 writes."""

    options: TrainerConfig
    policy: Policy
    engine: RolloutEngine
    push_weights: Callable[[], None]
    validate: Callable[[], Validation]  # leader
    run_state: Callable[[], Mapping[str, Any]]  # leader
    checkpoints: CheckpointStore
    export: Callable[[Path], None]
    log: Sink
    stopwatch: Stopwatch
    folder: Path

    def before_training(self) -> None:
        """Step 0: what the policy can do before it is trained."""
        self.stopwatch.lap()
        if self.options.val_before_train and self.policy.step == 0:
            self._write(0, [self._validate(0)])

    def finish(self, step: int, collected: Collected, updates: list[dict[str, Ratio]]) -> None:
        """Count the step, then validate and save when they are due, and write its metrics."""
        self.policy.finish_step()
        metrics = [merge(updates), collected.metrics()]
        if self._due(step, self.options.test_freq, also_last=self.options.test_freq > 0):
            metrics.append(self._validate(step))
        if is_leader():
            write_rollouts(self.folder / "rollouts", f"train_{step:06d}", collected.groups, self.options.rollouts_to_keep)
        self._write(step, metrics, trained_tokens(collected))
        if self._due(step, self.options.save_freq, also_last=True):
            self.save()

    def save(self) -> None:
        state = lead(self.run_state)
        self.checkpoints.save(self.policy.step, self.policy, state)

    def end_of_run(self) -> None:
        """After the last step, or where the sampler stopped the run: everything is kept, the policy exported."""
        if self.options.save_hf_model:
            self.export(self.folder / "hf_model")

    def _due(self, step: int, every: int, also_last: bool) -> bool:
        return bool(every and step % every == 0) or (also_last and step == self.options.total_training_steps)

    def _validate(self, step: int) -> dict[str, Ratio]:
        self.push_weights()
        validation = self.stopwatch.wrap("validate", lead)(self.validate, self.engine)
        if is_leader():
            write_rollouts(self.folder / "rollouts", f"val_{step:06d}", validation.groups, self.options.rollouts_to_keep)
        return validation.metrics

    def _write(self, step: int, metrics: list[dict[str, Ratio]], tokens: int = 0) -> None:
        row = {name: ratio.value for part in metrics for name, ratio in part.items()}
        row |= self.stopwatch.lap()
        if tokens:
            row["time/tokens_per_s"] = tokens / row["time/step_s"]
        self.log(step, row)


def trained_tokens(collected: Collected) -> int:
    """Prompt and response tokens of the responses a step trains on."""
    return sum(
        len(group.prompt.token_ids) + len(sample.response.token_ids)
        for group in collected.groups
        for sample in group.samples
    )
