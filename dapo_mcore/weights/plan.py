"""The way of every weight from the rank that trains it to the ranks that sample with it, found once from the layouts.

A plan is a pure function of its arguments: every rank finds the same one, and none needs to hear of another's.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from operator import itemgetter
from typing import Any

from dapo_mcore.weights.boxes import Box, Pair, Shard, between
from dapo_mcore.weights.layouts import Layout
from dapo_mcore.weights.names import Parameter, parameters
from dapo_mcore.weights.placement import Holders, RolloutLayout, TrainLayout, holders
from dapo_mcore.weights.sections import Stage


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
        """What crosses between ranks, parameter by parameter, in rounds.

        In a round no rank sends and none receives more than `bucket` elements, and what one rank has for another is one
        message: the transfers between the two, one after the other. A larger transfer is cut by rows, and a row that is
        larger by itself by columns.
        """
        rounds: list[list[Transfer]] = [[]]
        sent: Counter[int] = Counter()
        received: Counter[int] = Counter()
        pieces = chain.from_iterable(_pieces(t, bucket) for t in self.transfers if not t.is_local)
        for transfer in _taking_turns(pieces, self.train.ranks):
            size = transfer.size
            if sent[transfer.source] + size > bucket or received[transfer.destination] + size > bucket:
                rounds.append([])
                sent.clear()
                received.clear()
            rounds[-1].append(transfer)
            sent[transfer.source] += size
            received[transfer.destination] += size
        return tuple(tuple(transfers) for transfers in rounds if transfers)

    @property
    def digest(self) -> str:
        """Equal on ranks that found the same plan."""
        rows = ((t.source, t.destination, t.parameter, t.expert, *t.mcore_at, *t.vllm_at, *t.shape)
                for t in self.transfers)  # fmt: skip
        content = array("q", chain.from_iterable(rows)).tobytes()
        return hashlib.sha256(f"{self.train} {self.rollout}".encode() + content).hexdigest()


def reshard_plan(
    hf_config: Any, train: TrainLayout, rollout: RolloutLayout, padded_vocab: int | None = None, node: int = 8
) -> Plan:
    """Every element of every vLLM parameter once, from a rank that holds it: the destination itself if it does, else
    the one that has least to send so far on its node (of `node` consecutive ranks), else anywhere.

    `padded_vocab`: rows of Megatron's embedding, None: as many as the model has. ValueError, naming the option, if the
    model cannot be cut as one of the layouts says.
    """
    rows = tuple(parameters(hf_config, padded_vocab))
    layers = check_fit(rows, train, rollout)
    load: Counter[int] = Counter()  # elements to send, by rank
    transfers: list[Transfer] = []
    for index, parameter in enumerate(rows):
        if parameter.row.twin:
            continue
        boxes = _boxes(parameter.layout, train.parts(parameter), rollout.parts(parameter))
        for expert in range(parameter.experts) if parameter.experts else (-1,):
            sources = holders(train, parameter, expert, layers)
            wanted = holders(rollout, parameter, expert, layers)
            for destination, part in sorted((rank, part) for part, ranks in enumerate(wanted) for rank in ranks):
                chosen = _sources(boxes[part], sources, destination, load, node)
                transfers += [
                    Transfer(chosen[box.tensor], destination, index, expert, box.source, box.at, box.shape)
                    for box in boxes[part]
                ]
    return Plan(train, rollout, tuple(transfers))


def check_fit(rows: Sequence[Parameter], train: TrainLayout, rollout: RolloutLayout) -> int:
    """The number of decoder layers of a model. ValueError, naming the option, if it cannot be cut as a layout says."""
    layers = 1 + max(row.layer for row in rows if row.section.stage is Stage.LAYER)
    if layers % (train.pp * train.vpp):
        raise ValueError(f"train pp={train.pp} x vpp={train.vpp}: do not divide the model's {layers} layers; choose "
                         f"stages and chunks whose product does")  # fmt: skip
    experts = max(row.experts for row in rows)
    if experts % train.ep or (train.ep > 1 and not experts):
        raise ValueError(_experts_refused("train", train.ep, experts, "a divisor of their number"))
    if rollout.ep > max(experts, 1):
        raise ValueError(_experts_refused("rollout", rollout.ep, experts, "at most their number"))
    for row in rows:
        name = "etp" if row.row.is_expert else "tp"
        _refusing(f"train {name}={train.parts(row)}", row, row.layout.mcore, train.parts(row))
        _refusing(f"rollout tp={rollout.parts(row)}", row, row.layout.vllm, rollout.parts(row))
    return layers


def _experts_refused(side: str, ep: int, experts: int, way_out: str) -> str:
    return f"{side} ep={ep}: the model has {experts} experts; use {way_out if experts else 'ep=1'}"


def _refusing(option: str, row: Parameter, cut: Callable[[int, int], Shard], parts: int) -> None:
    try:
        cut(0, parts)
    except ValueError as error:
        raise ValueError(f"{option}: {row.hf_forms[0].names[0]}: {error}") from None


@cache
def _boxes(layout: Layout, train_parts: int, rollout_parts: int) -> tuple[tuple[Box, ...], ...]:
    """For each part in vLLM its boxes out of Megatron's parts."""
    held = tuple(layout.mcore(part, train_parts) for part in range(train_parts))
    return tuple(between(layout.vllm(part, rollout_parts), held).boxes for part in range(rollout_parts))


def _sources(
    boxes: tuple[Box, ...], sources: Holders, destination: int, load: Counter[int], node: int
) -> dict[int, int]:
    """For each of Megatron's parts in `boxes` the rank that gives it; what it sends is added to its load."""
    chosen: dict[int, int] = {}
    for box in boxes:
        if box.tensor not in chosen:
            ranks = sources[box.tensor]
            near = [rank for rank in ranks if rank // node == destination // node]
            chosen[box.tensor] = (
                destination if destination in near else min(near or ranks, key=lambda rank: (load[rank], rank))
            )
        if chosen[box.tensor] != destination:
            load[chosen[box.tensor]] += math.prod(box.shape)
    return chosen


def _taking_turns(transfers: Iterable[Transfer], ranks: int) -> list[Transfer]:
    """By parameter, and in each what every rank has for the next rank, for the one after that, and so on, in turn.

    At every turn no two ranks send to the same one. In the plan's own order a round would be full with what the first
    rank has for all others, since experts lie in order on their ranks.
    """
    turns: Counter[tuple[int, int, int]] = Counter()
    ordered: list[tuple[tuple[int, int, int], Transfer]] = []
    for t in transfers:
        turns[t.parameter, t.source, t.destination] += 1
        turn = turns[t.parameter, t.source, t.destination]
        ordered.append(((t.parameter, turn, (t.destination - t.source) % ranks), t))
    ordered.sort(key=itemgetter(0))
    return [transfer for _, transfer in ordered]


def _pieces(transfer: Transfer, bucket: int) -> Iterator[Transfer]:
    """A transfer in parts of at most `bucket` elements."""
    if transfer.size <= bucket:
        yield transfer
        return
    rows, columns = transfer.shape
    width = min(columns, bucket)
    height = bucket // width
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            yield replace(
                transfer,
                mcore_at=(transfer.mcore_at[0] + row, transfer.mcore_at[1] + column),
                vllm_at=(transfer.vllm_at[0] + row, transfer.vllm_at[1] + column),
                shape=(min(height, rows - row), min(width, columns - column)),
            )
