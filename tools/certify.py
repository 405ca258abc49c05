"""Certifies that no layout and no option changes the update: loss, metrics and every gradient against float64.

    python -m tools.certify [--processes N] [--quick]              all layouts of up to N processes of this machine
    torchrun ... -m tools.certify --layout tp=2,pp=2 --dtype bf16  one layout on the ranks of a cluster

The reference is one process with the Hugging Face model and the loss in plain torch (tools/certificate/reference.py).
Ends with exit code 0 when every case is within the tolerance, else 1.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, when called as a file

from dapo_mcore.actor.parallel import init_process_group
from dapo_mcore.config import Dtype
from tools.certificate.cases import TOLERANCE, Case, all_cases, cases_of, write_models, write_truths
from tools.certificate.layouts import parse
from tools.certificate.measure import Measured, measure_all
from tools.certificate.spawn import spawn
from tools.figures import Figure, as_json


def certify_here(cases: Sequence[Case], folder: Path) -> list[Measured]:
    """Starts the ranks of each world size once."""
    write_models(cases, folder)
    write_truths(cases, folder)
    measured: list[Measured] = []
    for world in sorted({case.layout.world for case in cases}):
        selected = [case for case in cases if case.layout.world == world]
        measured += spawn(measure_all, world, selected, folder)[0]
    return measured


def certify_under_launcher(cases: Sequence[Case], folder: Path) -> list[Measured]:
    """On the ranks a launcher has started. Every rank has models and truths of its own: hosts may share no disk."""
    write_models(cases, folder)  # transformers saves on the first rank only, once ranks know of each other
    write_truths(cases, folder)
    init_process_group()
    return measure_all(cases, folder)


def table(measured: Sequence[Measured]) -> str:
    head = f"{'case':66} {'loss':>8} {'gradient':>8} {'metrics':>8}  verdict  worst gradient"
    return "\n".join([head, *(_line(m) for m in measured)])


def _line(m: Measured) -> str:
    verdict, cause = ("ok", "") if m.is_within else ("FAILED", f" ({m.metric.name})")
    errors = f"{m.loss:8.1e} {m.gradient.error:8.1e} {m.metric.error:8.1e}"
    return f"{m.case!s:66} {errors}  {verdict:7}  {m.gradient.name}{cause}"


def summary(measured: Sequence[Measured], dtype: Dtype) -> str:
    passed = sum(m.is_within for m in measured)
    return f"certificate: {passed} of {len(measured)} within {TOLERANCE[dtype]:.0e}"


def figures(measured: Sequence[Measured], dtype: Dtype) -> list[Figure]:
    """The worst of all cases; NaN where one has it."""
    errors = {
        "loss": [m.loss for m in measured],
        "gradient": [m.gradient.error for m in measured],
        "metric": [m.metric.error for m in measured],
    }
    worst = {name: math.nan if any(map(math.isnan, found)) else max(found) for name, found in errors.items()}
    bars = [Figure(f"worst relative error of a {name}", value, bar=TOLERANCE[dtype]) for name, value in worst.items()]
    return [Figure("cases", len(measured)), *bars]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4, help="most processes of a layout (default 4)")
    parser.add_argument("--quick", action="store_true", help="one model and one option for each layout")
    parser.add_argument("--layout", default="", help="under a launcher: e.g. tp=2,sp=1,pp=2,vpp=2,cp=2,ep=4,etp=1")
    parser.add_argument("--dtype", choices=[d.name for d in Dtype], default="fp32", help="under a launcher")
    parser.add_argument("--json", action="store_true", help="end with the worst errors as a line of JSON")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    launched, dtype = "RANK" in os.environ, Dtype[given.dtype]
    if not launched and (given.layout or dtype is not Dtype.fp32):
        parser.error("--layout and --dtype are for ranks that a launcher has started: torchrun ... -m tools.certify")
    with tempfile.TemporaryDirectory() as folder:
        if launched:
            cases = list(cases_of(parse(given.layout, int(os.environ["WORLD_SIZE"])), dtype, given.quick))
            measured = certify_under_launcher(cases, Path(folder))
        else:
            cases = [case for case in all_cases(given.quick) if case.layout.world <= given.processes]
            measured = certify_here(cases, Path(folder))
    if not launched or dist.get_rank() == 0:
        print(table(measured))
        print(summary(measured, dtype), flush=True)
        if given.json:
            print(as_json(figures(measured, dtype)), flush=True)
    return 0 if all(m.is_within for m in measured) else 1


if __name__ == "__main__":
    sys.exit(main())
