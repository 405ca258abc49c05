"""What a step's sampling took. All of it depends on how fast engine and grader were, unlike what is committed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dapo_mcore.algo.metrics import filter_metrics
from dapo_mcore.observe.metrics import Ratio
from dapo_mcore.rollout.wave import Wave


@dataclass(slots=True)
class Effort:
    """Follows a wave from poll to poll."""

    wave: Wave
    clock: Callable[[], float]
    polled: float = field(init=False)
    tail_s: float = 0.0
    sampling: list[int] = field(default_factory=list)  # queue depths at every poll
    grading: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.polled = self.clock()

    def observe(self) -> None:
        """Call after every poll."""
        now, pipeline = self.clock(), self.wave.pipeline
        self.sampling.append(len(pipeline.requests))
        self.grading.append(len(pipeline.responses))
        if 2 * self.sampling[-1] < pipeline.engine.capacity:
            self.tail_s += now - self.polled
        self.polled = now

    def metrics(self, trained_tokens: int) -> dict[str, Ratio]:
        wave, fill = self.wave, self.wave.fill
        shares = filter_metrics([group.close() for group in fill.groups.values() if group.is_whole])
        counts = {
            "groups_submitted": len(fill.groups) + wave.given_up,
            "groups_passed": sum(fill.verdicts.values()),
            "groups_all_right": shares["rollout/all_right_fraction"].total,
            "groups_all_wrong": shares["rollout/all_wrong_fraction"].total,
            "groups_aborted": sum(not group.is_whole for group in fill.surplus) + wave.given_up,
            "groups_banked": wave.bank.num_groups,
            "groups_from_bank": wave.from_bank,
            "groups_expired": wave.bank.expired_groups,
            "responses_aborted": wave.pipeline.aborted_responses,
            "generated_tokens": wave.pipeline.generated_tokens,
            "responses_in_flight_max": max(self.sampling, default=0),
            "responses_in_grading_max": max(self.grading, default=0),
        }
        generated = wave.pipeline.generated_tokens
        return {
            **{f"sampler/{name}": Ratio(count, 1) for name, count in counts.items()},
            "sampler/responses_in_flight": Ratio(sum(self.sampling), len(self.sampling)),
            "sampler/responses_in_grading": Ratio(sum(self.grading), len(self.grading)),
            "sampler/generated_per_trained_token": Ratio(generated, trained_tokens),
            "sampler/wasted_fraction": Ratio(wave.bank.dropped_tokens, generated),
            "time/rollout_tail_s": Ratio(self.tail_s, 1),
        }
