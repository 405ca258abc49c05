"""Looks at a machine line by line: what it has, what is wanted, and the cure where they differ.

    python -m tools.doctor [cpu|cuda|npu] [--nodes 2]

Imports nothing of what it looks at. Ends with 0 if every line fits, otherwise with 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.figures import Figure, as_json
from tools.inspection.machine import CANN_FOLDERS, Machine
from tools.inspection.matrix import KINDS, Line, examine


def guess(machine: Machine) -> str:
    if "torch-npu" in machine.versions or any((machine.root / folder).exists() for folder in CANN_FOLDERS):
        return "npu"
    return "cuda" if machine.torch_is_for_cuda else "cpu"


def report(lines: Sequence[Line]) -> list[str]:
    what, found = (max(len(getattr(line, column)) for line in lines) for column in ("what", "found"))
    told: list[str] = []
    for line in lines:
        mark = "WRONG" if line.cure else "ok"
        told.append(f"{mark:<6} {line.what:<{what}}  {line.found:<{found}}  {line.wanted}")
        if line.cure:
            told.append(f"       cure: {line.cure}")
    return told


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", choices=KINDS, help="of machine; found out if left out")
    parser.add_argument("--nodes", type=int, default=1, help="that train together (default 1)")
    parser.add_argument("--packages", action="append", help="look for packages in this folder instead of Python's")
    parser.add_argument("--root", type=Path, default=Path("/"), help="of the file system that holds CANN")
    parser.add_argument("--json", action="store_true", help="end with the count of wrong lines as JSON")
    given = parser.parse_args(argv)
    machine = Machine(given.packages or sys.path, given.root, nodes=given.nodes)
    kind = given.kind or guess(machine)
    lines = examine(machine, kind)
    wrong = sum(bool(line.cure) for line in lines)
    print("\n".join(report(lines)))
    print(f"{kind}: {'fits' if not wrong else f'{wrong} of {len(lines)} lines do not fit'}")
    if given.json:
        print(as_json([Figure("lines that do not fit", wrong, bar=0)]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
