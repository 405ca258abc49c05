"""What a push of weights will cost, before any rank is started.

    python -m tools.plan reshard --model Qwen3-30B-A3B --train tp=4,ep=8 --rollout tp=8,ep=8 --ranks 8 [--json]

The plan is the one that ranks with these layouts find when they start.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from dapo_mcore.weights.families import language_config
from dapo_mcore.weights.names import Parameter, parameters
from dapo_mcore.weights.placement import RolloutLayout, TrainLayout
from dapo_mcore.weights.plan import Plan, reshard_plan

MODELS = Path(__file__).parents[1] / "configs" / "models"
ITEM_BYTES = {"bf16": 2, "fp32": 4}
SideT = TypeVar("SideT", TrainLayout, RolloutLayout)


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


def read_model(model: str) -> Any:
    """The sizes of one of `configs/models`, or of a Hugging Face folder."""
    known = MODELS / f"{model}.json"
    if known.is_file():
        return SimpleNamespace(**json.loads(known.read_text()))
    if not (Path(model) / "config.json").is_file():
        names = ", ".join(sorted(path.stem for path in MODELS.glob("*.json")))
        raise ValueError(f"--model {model}: neither a folder with a config.json nor one of {names}; give one of these")
    from transformers import AutoConfig  # not above: the models known here need no second for it

    try:
        return AutoConfig.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {model}: its config.json cannot be read ({error}); download it again") from None


def read_layout(side: type[SideT], option: str, text: str, ranks: int) -> SideT:
    """Sizes as in tp=4,ep=8; what is not named is 1."""
    names = [field.name for field in fields(side) if field.name != "ranks"]
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in names or name in sizes or not size.isdecimal():
            raise ValueError(f"{option} {text}: {part!r} is not one of {'=N, '.join(names)}=N, each at most once")
        sizes[name] = int(size)
    return side(ranks=ranks, **sizes)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def reshard(given: argparse.Namespace) -> None:
    hf_config = read_model(given.model)
    train = read_layout(TrainLayout, "--train", given.train, given.ranks)
    rollout = read_layout(RolloutLayout, "--rollout", given.rollout, given.ranks)
    rows = language_config(hf_config).vocab_size
    padded = rows + -rows % (given.vocab_divisible_by * train.tp)
    plan = reshard_plan(hf_config, train, rollout, padded, given.node)
    item_bytes = ITEM_BYTES[given.dtype]
    found = traffic(hf_config, plan, padded, item_bytes, (given.bucket_mb << 20) // item_bytes // 2)
    if given.json:
        print(json.dumps(found.summary()))
    else:
        Console().print(table(found))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command = parser.add_subparsers(required=True).add_parser("reshard", help="bytes and messages of a push, by rank")
    command.add_argument("--model", required=True, help="a name in configs/models, or a folder with a config.json")
    command.add_argument("--train", default="", help="e.g. tp=4,pp=2,vpp=2,cp=1,ep=8,etp=1; what is left out is 1")
    command.add_argument("--rollout", default="", help="e.g. tp=8,ep=8; ep above tp: attention is data parallel")
    command.add_argument("--ranks", type=positive, required=True, help="processes that train and sample")
    command.add_argument("--node", type=positive, default=8, help="ranks per node, consecutive (default 8)")
    command.add_argument("--dtype", choices=ITEM_BYTES, default="bf16", help="of the weights (default bf16)")
    command.add_argument(
        "--bucket-mb",
        type=positive,
        default=256,
        help="MiB a rank stages at a time, half to send, half to receive (default 256)",
    )
    command.add_argument("--vocab-divisible-by", type=positive, default=1,
                         help="Megatron's embedding is padded to a multiple of this times tp (default 1)")  # fmt: skip
    command.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    try:
        reshard(parser.parse_args(argv))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
