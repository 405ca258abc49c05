"""What a step's row in the metrics holds besides what sampling and training measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dapo_mcore.config import TrainerConfig
from dapo_mcore.end_of_step import EndOfStep
from dapo_mcore.interruption import Interruption
from dapo_mcore.observe.stopwatch import Stopwatch
from dapo_mcore.rollout.collected import Collected


class Policy:
    step = 1

    def finish_step(self) -> None: ...


def test_a_row_has_the_peak_of_the_device_in_gib(tmp_path: Path) -> None:
    rows: dict[int, Any] = {}
    unused: Any = None
    end = EndOfStep(
        options=TrainerConfig(total_training_steps=9, test_freq=0, save_freq=0),
        policy=Policy(),  # type: ignore[arg-type]
        push_weights=unused,
        push_metrics=dict,
        validate=unused,
        run_state=dict,
        end_sampling=unused,
        interruption=Interruption(),
        checkpoints=unused,
        export=unused,
        log=rows.__setitem__,
        stopwatch=Stopwatch(),
        peak_memory=lambda: 3 << 29,
        folder=tmp_path,
    )
    end.finish(1, Collected((), ()), [])
    assert rows[1]["perf/max_memory_allocated_gb"] == 1.5
