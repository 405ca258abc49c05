"""What a push of weights will cost, and what a run takes of every device's memory, before any rank is started.

    python -m tools.plan reshard --model Qwen3-30B-A3B --train tp=4,ep=8 --rollout tp=8,ep=8 --ranks 8 [--json]
    python -m tools.plan memory --model Qwen3-VL-30B-A3B --ranks 8 experiment=dapo_qwen3_vl_30b_geo3k [option=value ..]

The plan of a push is the one that ranks with these layouts find when they start; the memory is calculated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from rich.console import Console

from dapo_mcore.layout_check import check_model_fits, check_world
from dapo_mcore.memory import footprint
from dapo_mcore.memory import table as memory_table
from dapo_mcore.train import load_config
from dapo_mcore.weights.families import language_config
from dapo_mcore.weights.placement import RolloutLayout, TrainLayout
from dapo_mcore.weights.plan import reshard_plan
from tools.traffic import table, traffic

MODELS = Path(__file__).parents[1] / "configs" / "models"
ITEM_BYTES = {"bf16": 2, "fp32": 4}
SideT = TypeVar("SideT", TrainLayout, RolloutLayout)


def read_model(model: str) -> Any:
    """The sizes of one of `configs/models`, or of a Hugging Face folder."""
    known = MODELS / f"{model}.json"
    if known.is_file():
        return json.loads(known.read_text(), object_hook=lambda entries: SimpleNamespace(**entries))
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


def memory(given: argparse.Namespace) -> None:
    hf_config = read_model(given.model)
    config = load_config([f"model.path={given.model}", *given.overrides])
    check_world(config.actor.megatron, config.rollout, given.ranks)
    check_model_fits(config.actor.megatron, config.rollout, vars(language_config(hf_config)))
    found = footprint(config, hf_config, given.ranks)
    print("\n".join(memory_table(found, given.ranks, given.node)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, run, told in (
        ("reshard", reshard, "bytes and messages of a push, by rank"),
        ("memory", memory, "bytes of the fullest device and of its host, by what holds them"),
    ):
        command = commands.add_parser(name, help=told)
        command.set_defaults(run=run)
        command.add_argument("--model", required=True, help="a name in configs/models, or a folder with a config.json")
        command.add_argument("--ranks", type=positive, required=True, help="processes that train and sample")
        command.add_argument("--node", type=positive, default=8, help="ranks per node, consecutive (default 8)")
    _add_reshard(commands.choices["reshard"])
    command = commands.choices["memory"]
    command.add_argument("overrides", nargs="*", help="experiment=NAME option=value .., as of dapo_mcore.train")
    given = parser.parse_args(argv)
    try:
        given.run(given)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _add_reshard(command: argparse.ArgumentParser) -> None:
    command.add_argument("--train", default="", help="e.g. tp=4,pp=2,vpp=2,cp=1,ep=8,etp=1; what is left out is 1")
    command.add_argument("--rollout", default="", help="e.g. tp=8,ep=8; ep above tp: attention is data parallel")
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


if __name__ == "__main__":
    sys.exit(main())
