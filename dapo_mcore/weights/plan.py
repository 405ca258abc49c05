"""The way of every weight from the rank that trains it to the ranks that sample with it, found once from the layouts.

A plan is a pure function of its arguments: every rank finds the same one, and none needs to hear of another's.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import Any

from dapo_mcore.weights.boxes import Box, Pair, between
from dapo_mcore.weights.layouts import Layout
from dapo_mcore.weights.names import Parameter, parameters
from dapo_mcore.weights.placement import RolloutLayout, TrainLayout, holders


@dataclass(frozen=True, slots=True)
class Transfer:
    """A rectangle of a Megatron parameter on one rank, and its place in vLLM's parameter on another or the same rank.

    Places and extents are (rows, columns) of the ranks' own tensors, those of an expert counted in its own matrix.
    """

    source: int  # rank
    destination: int  # rank
    parameter: int  # position in `names.parameters`
    expert: int  # counted over the whole model; -1: not an expert's
    mcore_at: Pair
    vllm_at: Pair
    shape: Pair

    @property
    def size(self) -> int:
        """Elements."""
        return self.shape[0] * self.shape[1]

    @property
    def is_local(self) -> bool:
        return self.source == self.destination


@dataclass(frozen=True, slots=True)
class Plan:
    """Transfers lie in the order of (parameter, expert, destination, place there), hence layer by layer."""

    train: TrainLayout
    rollout: RolloutLayout
    transfers: tuple[Transfer, ...]

    def copies(self, rank: int) -> tuple[Transfer, ...]:
        """What stays on a rank."""
        return tuple(t for t in self.transfers if t.source == rank and t.is_local)

    def sends(self, rank: int) -> tuple[Transfer, ...]:
        return tuple(t for t in self.transfers if t.source == rank and not t.is_local)

    def receives(self, rank: int) -> tuple[Transfer, ...]:
        return tuple(t for t in self.transfers if t.destination == rank and not t.is_local)

    def rounds(self, bucket: int) -> tuple[tuple[Transfer, ...], ...]:
        """What crosses between ranks, in the plan's order, in rounds.

        In a round no rank sends and none receives more than `bucket` elements, and what one rank has for another is one
        message: the transfers between the two, one after the other. A larger transfer is cut by rows (and a row that is
        larger by itself by columns).
        """
        ...

    @property
    def digest(self) -> str:
        """Equal on ranks that found the same plan."""
        ...


def reshard_plan(
    hf_config: Any, train: TrainLayout, rollout: RolloutLayout, padded_vocab: int | None = None, node: int = 8
) -> Plan:
    """Every element of every vLLM parameter once, from a rank that holds it: the destination itself if it does, else
    the one on its node (of `node` consecutive ranks) or else anywhere that has least to send so far.

    `padded_vocab`: rows of Megatron's embedding, None: as many as the model has. ValueError if the model cannot be cut
    as one of the layouts says.
    """
    ...
