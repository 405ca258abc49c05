"""Figures of what a run has left.

python -m tools.acceptance.evidence probe RUN            engine against policy, after every push
python -m tools.acceptance.evidence same RUN OTHER       metrics of two runs, bit for bit, of the steps both have
python -m tools.acceptance.evidence tests JUNIT.XML      tests that ran
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tools.figures import Figure, as_json

SPEED = ("time/", "sampler/")  # metrics that depend on how fast things are
PROBE_GAP = "weights/probe_gap"


def rows(run: Path) -> dict[int, dict[str, Any]]:
    """metrics.jsonl by step."""
    file = run / "metrics.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()]
    if not found:
        raise ValueError(f"{file}: no step is in it; look into the run's log")
    return {row["step"]: row for row in found}


def probe(run: Path, bar: float) -> list[Figure]:
    gaps = [row[PROBE_GAP] for row in rows(run).values() if row.get(PROBE_GAP) is not None]
    if not gaps:
        raise ValueError(f"{run}: no step has {PROBE_GAP}; run with weights.attest=full")
    timed = [row for step, row in rows(run).items() if step > 1]  # the first step warms up
    seconds = {
        f"{phase}, a step": min(row[f"time/{phase}_s"] for row in timed if f"time/{phase}_s" in row)
        for phase in ("push", "rollout", "update")
    }
    largest = Figure("largest probe gap", max(gaps), "nats", bar)
    return [largest, *(Figure(name, value, "s") for name, value in seconds.items())]


def same(run: Path, other: Path) -> list[Figure]:
    first, second = rows(run), rows(other)
    common = sorted(first.keys() & second.keys())
    differing = [step for step in common if settled(first[step]) != settled(second[step])]
    compared = Figure("steps compared", len(common), bar=1, at_least=True)
    return [compared, Figure("steps that differ", len(differing), bar=0)]


def settled(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith(SPEED)}


def tests(report: Path) -> list[Figure]:
    """A test that was skipped is none that passed."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    if suite is None:
        raise ValueError(f"{report}: no test suite is in it; look into the log of pytest")
    total, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    wrong = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    passed = Figure("passed", total - skipped - wrong, bar=1, at_least=True)
    return [passed, Figure("failed", wrong, bar=0), Figure("skipped", skipped)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)

    def kind(name: str, read: Callable[[argparse.Namespace], list[Figure]], *paths: str) -> argparse.ArgumentParser:
        added = kinds.add_parser(name)
        added.set_defaults(read=read)
        for path in paths:
            added.add_argument(path, type=Path)
        return added

    kind("probe", lambda given: probe(given.run, given.bar), "run").add_argument("--bar", type=float, default=0.3)
    kind("same", lambda given: same(given.run, given.other), "run", "other")
    kind("tests", lambda given: tests(given.report), "report")
    given = parser.parse_args(argv)
    try:
        print(as_json(given.read(given)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
