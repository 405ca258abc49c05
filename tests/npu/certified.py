"""Cases of the certificate on ranks that are children of this process, which has MindSpeed's layers already."""

from __future__ import annotations

import json
import os
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

FUSED = ", fused"


def certified(names: Sequence[str], family: str, dtype: str = "fp32") -> dict[str, Any]:
    """One update on each of these layouts of the certificate, one after the other on the same ranks.

    "NAME, fused" is the layout NAME with the fusions that are off by default. What reached npu_fusion_attention, and
    which operators ran, is told by the first rank.

    {"cases": [], "error": ...} where a rank ended otherwise.
    """
    from dapo_mcore.config import Dtype
    from tools.certificate.cases import Case, write_models, write_truths
    from tools.certificate.options import BASE

    layouts = [_layout(name) for name in names]
    cases = [Case(layout, family, BASE, Dtype[dtype]) for layout in layouts]
    world = layouts[0].world
    with tempfile.TemporaryDirectory() as folder:
        write_models(cases, Path(folder))
        write_truths(cases, Path(folder))
        children = [_fork(rank, world, cases, Path(folder)) for rank in range(world)]
        for child in children:
            os.waitpid(child, 0)
        answers = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json"))]
    failed = [answer for answer in answers if "error" in answer]
    return failed[0] if failed else answers[0]


def _layout(name: str) -> Any:
    from tools.certificate.layouts import LAYOUTS

    (layout,) = (layout for layout in LAYOUTS if layout.name == name.removesuffix(FUSED))
    fused = {"moe_permute_fusion": True, "apply_rope_fusion": True} if name.endswith(FUSED) else {}
    return replace(layout, megatron=replace(layout.megatron, **fused))


def _fork(rank: int, world: int, cases: list[Any], folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        answer = _measured(rank, world, cases, folder)
    except BaseException:  # noqa: BLE001 - told to the parent
        answer = {"cases": [], "error": traceback.format_exc()}
    (folder / f"{rank}.json").write_text(json.dumps(answer))
    os._exit(0)


def _measured(rank: int, world: int, cases: list[Any], folder: Path) -> dict[str, Any]:
    from npu_operators import CALLED
    from npu_operators.attention import RECORDS

    from dapo_mcore.actor.parallel import Rendezvous, init_process_group
    from tools.certificate.measure import measure_all

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    init_process_group(Rendezvous(f"file://{folder}/rendezvous", rank, world), timeout_s=300.0)
    measured = measure_all(cases, folder)
    found = [
        {"loss": m.loss, "gradient": asdict(m.gradient), "metric": asdict(m.metric), "within": m.is_within}
        for m in measured
    ]
    return {"cases": found, "records": [asdict(record) for record in RECORDS], "operators": sorted(CALLED)}
