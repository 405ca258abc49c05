"""Verifier `reasoning_gym`: the scorer that belongs to the task which generated the problem."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import reasoning_gym

from dapo_mcore.reward.answers import last_tagged, tail
from dapo_mcore.reward.verdicts import judged
from dapo_mcore.types import Verdict


def verify(response: str, answer: str, metadata: Mapping[str, Any]) -> Verdict:
    """Scores the last `<answer>` tag; right means the scorer's full mark, 1.0.

    Scorers give crumbs (0.01 and more) for garbage and for nothing at all: partial marks would make groups look mixed
    that are all wrong.

    Raises:
        ValueError: the prompt does not come from a reasoning-gym task.
    """
    if "task" not in metadata or "entry" not in metadata:
        raise ValueError(
            "reward.verifier=reasoning_gym: the prompt carries no task entry; take the problems from "
            "data.train.task, or choose another verifier for files"
        )
    given = last_tagged(tail(response))
    if given is None:
        return judged(False)
    task = _task(metadata["task"], json.dumps(metadata["task_options"], sort_keys=True))
    return judged(task.score_answer(given.strip(), metadata["entry"]) >= 1.0)


@lru_cache(maxsize=64)
def _task(name: str, options: str) -> Any:
    return reasoning_gym.create_dataset(name, size=1, seed=0, **json.loads(options))
