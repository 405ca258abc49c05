"""What the plan of a push moves, rank by rank."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from dapo_mcore.weights.families import language_config
from dapo_mcore.weights.names import Parameter, parameters
from dapo_mcore.weights.placement import TrainLayout
from dapo_mcore.weights.plan import Plan


@dataclass(frozen=True, slots=True)
class Traffic:
    """By rank; bytes but for the messages."""

    trained: tuple[int, ...]  # held under Megatron, padding not counted
    sampled: tuple[int, ...]  # held under vLLM, likewise
    sent: tuple[int, ...]
    received: tuple[int, ...]
    messages: tuple[int, ...]  # sent
    model: int  # the whole model

    @property
    def gathered(self) -> int:
        """Received by the busiest rank if every rank collects the whole model."""
        return self.model - min(self.trained)

    def summary(self) -> dict[str, float]:
        return {
            "busiest_rank_recv_gb": max(self.received) / 1e9,
            "total_wire_gb": sum(self.received) / 1e9,
            "gather_gb": self.gathered / 1e9,
            "messages": sum(self.messages),
        }


def traffic(hf_config: Any, plan: Plan, padded_vocab: int, item_bytes: int, bucket: int) -> Traffic:
    """What a plan moves when an element has `item_bytes`, and a rank sends at most `bucket` elements in a round."""
    sampled: Counter[int] = Counter()
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    for t in plan.transfers:
        sampled[t.destination] += t.size
        if not t.is_local:
            sent[t.source] += t.size
            received[t.destination] += t.size
    pairs = ({(t.source, t.destination) for t in transfers} for transfers in plan.rounds(bucket))
    messages = Counter(source for pairs_of_round in pairs for source, _ in pairs_of_round)
    rows = [row for row in parameters(hf_config, padded_vocab) if not row.row.twin]
    trained = Counter[int]()
    for row in rows:
        trained.update(_trained(row, plan.train, language_config(hf_config).num_hidden_layers))
    elements = ([counter[rank] * item_bytes for rank in range(plan.train.ranks)]
                for counter in (trained, sampled, sent, received))  # fmt: skip
    return Traffic(
        *map(tuple, elements),
        messages=tuple(messages[rank] for rank in range(plan.train.ranks)),
        model=item_bytes * sum(row.layout.mcore(0, 1).size * max(row.experts, 1) for row in rows),
    )


def _trained(row: Parameter, train: TrainLayout, layers: int) -> dict[int, int]:
    """Elements of a parameter, by the ranks that train them."""
    parts = train.parts(row)
    sizes = [row.layout.mcore(part, parts).size for part in range(parts)]
    return {
        rank: sizes[rank % parts] * (len(train.experts(rank, row.experts)) if row.experts else 1)
        for rank in train.ranks_of(row, layers)
    }


def table(found: Traffic) -> Table:
    unit, one = ("GB", 1e9) if found.model >= 1e9 else ("MB", 1e6)
    shown = Table(title=f"{unit} per rank", caption=_caption(found, unit, one), caption_justify="left")
    for heading in ("rank", "trains", "samples", "of it local", "sends", "receives", "messages"):
        shown.add_column(heading, justify="right")
    columns = (found.trained, found.sampled, found.sent, found.received, found.messages)
    for rank, (trained, sampled, sent, received, messages) in enumerate(zip(*columns, strict=True)):
        sizes = (trained, sampled, sampled - received, sent, received)
        shown.add_row(str(rank), *(f"{size / one:.3f}" for size in sizes), str(messages))
    return shown


def _caption(found: Traffic, unit: str, one: float) -> str:
    busiest = max(found.received)
    gain = f"{found.gathered / busiest:.1f} times as much" if busiest else "here nothing crosses"
    return (
        f"The busiest rank receives {busiest / one:.3f} {unit}; if every rank collected the whole model, "
        f"{found.model / one:.2f} {unit}, it would be {found.gathered / one:.3f} {unit}, {gain}. All ranks together: "
        f"{sum(found.received) / one:.3f} {unit} in {sum(found.messages)} messages."
    )
