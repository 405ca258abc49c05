"""One rank's part of a plan: what it sends, receives and copies, in which order, and which tensors that fills."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from dapo_mcore.weights.boxes import Shape, Shard
from dapo_mcore.weights.names import Parameter
from dapo_mcore.weights.placement import RolloutLayout
from dapo_mcore.weights.plan import Plan, Transfer
from dapo_mcore.weights.sections import Stage


@dataclass(frozen=True, slots=True)
class Target:
    """A parameter of the rollout engine on this rank."""

    name: str  # in the engine
    shard: Shard  # of the parameter, or of each of its experts
    experts: range  # those of this rank, in order; empty for a parameter without

    @property
    def shape(self) -> Shape:
        return (len(self.experts), *self.shard.shape) if self.experts else self.shard.shape

    @property
    def size(self) -> int:
        """Elements that are not padding."""
        return self.shard.size * (len(self.experts) or 1)


def targets(
    declared: Sequence[Parameter], layout: RolloutLayout, rank: int, shapes: Mapping[str, Shape]
) -> dict[int, Target]:
    """By position in `declared`. `shapes`: of the engine's parameters; of several names a parameter has that of these.

    A parameter of which the rank holds no expert has no target.
    """
    found: dict[int, Target] = {}
    for position, parameter in enumerate(declared):
        if parameter.row.twin:
            continue
        names = [form.names[0] for form in parameter.vllm_forms]
        parts = layout.parts(parameter)
        shard = parameter.layout.vllm(rank % parts, parts)
        experts = layout.experts(rank, parameter.experts)
        if experts or not parameter.experts:
            found[position] = Target(next((name for name in names if name in shapes), names[0]), shard, experts)
    return found


def mismatches(
    targets: Mapping[int, Target], pieces: Sequence[Transfer], rank: int, shapes: Mapping[str, Shape]
) -> list[str]:
    """Where the engine's parameters and what the pieces fill on this rank are not the same, each by name."""
    written = Counter[int]()
    for piece in pieces:
        if piece.destination == rank:
            written[piece.parameter] += piece.size
    found = [f"{name} of the engine is not in the family's table" for name in shapes.keys() - _names(targets)]
    for position, target in targets.items():
        shape = shapes.get(target.name)
        if shape != target.shape:
            found.append(f"{target.name}: the engine has {shape and list(shape)}, the layout says {list(target.shape)}")
        if written[position] != target.size:
            found.append(f"{target.name}: the plan writes {written[position]} of {target.size} elements")
    return sorted(found)


def _names(targets: Mapping[int, Target]) -> set[str]:
    return {target.name for target in targets.values()}


@dataclass(slots=True)
class LayerOfEngine:
    """Parameters that the engine takes over together, and the pieces written to them, by number."""

    names: list[str] = field(default_factory=list)
    copies: list[int] = field(default_factory=list)  # from this rank
    received: list[int] = field(default_factory=list)  # from others


@dataclass(slots=True)
class Round:
    """What this rank sends to and receives from each other rank at once, and the layers that are whole afterwards."""

    sends: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    receives: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    completes: list[LayerOfEngine] = field(default_factory=list)


def numbered(plan: Plan, bucket: int) -> tuple[list[Transfer], list[range]]:
    """All pieces of a plan, those that stay on their rank first; and the numbers of each round of `bucket` elements."""
    pieces = [transfer for transfer in plan.transfers if transfer.is_local]
    rounds: list[range] = []
    for sent in plan.rounds(bucket):
        rounds.append(range(len(pieces), len(pieces) + len(sent)))
        pieces += sent
    return pieces, rounds


def itinerary(
    pieces: Sequence[Transfer],
    rounds: Sequence[range],
    rank: int,
    declared: Sequence[Parameter],
    targets: Mapping[int, Target],
) -> list[Round]:
    """The rounds of this rank, after one in which nothing crosses. A layer ends with the last piece it waits for."""
    layers: dict[tuple[str, int], LayerOfEngine] = {}
    layer_of: dict[int, LayerOfEngine] = {}
    for position, target in targets.items():
        is_layer = declared[position].section.stage is Stage.LAYER
        key = ("layer", declared[position].layer) if is_layer else ("parameter", position)
        layer_of[position] = layers.setdefault(key, LayerOfEngine())
        layer_of[position].names.append(target.name)
    found = [Round() for _ in range(len(rounds) + 1)]
    last = dict.fromkeys(map(id, layers.values()), 0)
    for number, piece in enumerate(pieces[: rounds[0].start if rounds else len(pieces)]):
        if piece.destination == rank:
            layer_of[piece.parameter].copies.append(number)
    for index, number in chain.from_iterable(((i, n) for n in numbers) for i, numbers in enumerate(rounds, 1)):
        piece = pieces[number]
        if piece.source == rank:
            found[index].sends[piece.destination].append(number)
        if piece.destination == rank:
            found[index].receives[piece.source].append(number)
            layer_of[piece.parameter].received.append(number)
            last[id(layer_of[piece.parameter])] = index
    for layer in layers.values():
        found[last[id(layer)]].completes.append(layer)
    return found
