"""The loss options the certificate covers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dapo_mcore.config import ActorConfig
from dapo_mcore.types import TrainBatch
from tools.certificate.layouts import DENSE, MOE
from tools.certificate.reference import random_batch

# The first is longer than the budget; data-parallel ranks need different numbers of micro-batches.
UNEVEN = ((5, 70), (3, 20), (9, 13), (2, 30), (7, 7))
BUDGET = 40  # tokens of a micro-batch


@dataclass(frozen=True)
class Option:
    """What a loss is computed with and on."""

    actor: Mapping[str, Any] = field(default_factory=dict)  # fields of ActorConfig
    temperature: float = 1.0
    on_policy: bool = False  # no old log-probabilities: the ratio is exactly 1
    lengths: tuple[tuple[int, int], ...] = UNEVEN  # prompt and response of each sequence, tokens

    def actor_config(self, **settings: Any) -> ActorConfig:
        return ActorConfig(**{"ppo_max_token_len_per_gpu": BUDGET, **self.actor, **settings})

    def batch(self) -> TrainBatch:
        return random_batch(0, list(self.lengths), old_logprobs=not self.on_policy)


BASE = "DAPO"  # on every layout
OPTIONS: dict[str, Option] = {
    BASE: Option(),
    "one response": Option(lengths=((4, 21),), on_policy=True),
    "on-policy": Option(on_policy=True),
    "symmetric clip": Option({"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}),
    "dual clip 2": Option({"clip_ratio_c": 2.0}),
    "entropy bonus": Option({"entropy_coeff": 0.01}),
    "temperature 0.7": Option(temperature=0.7),
}

# Every option but the base runs on these (layout, family).
OPTION_LAYOUTS = (
    ("single", DENSE),
    ("DP2", DENSE),
    ("TP2+SP", MOE),
    ("CP2", MOE),
    ("PP2", DENSE),
    ("PP2xCP2xEP2", MOE),
)
