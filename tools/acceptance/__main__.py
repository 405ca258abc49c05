"""Makes every check that this machine can make, and reports what it measured beside the bars.

    python -m tools.acceptance --list                      what would run here
    python -m tools.acceptance                             everything, on all devices of this machine
    python -m tools.acceptance --only run loss             the checks that begin with these words
    python -m tools.acceptance --platform cpu --devices 2  in small, on two processes

A check that fails or takes too long does not keep the others from being made. Ends with 1 if one failed or missed a
bar. Each leaves its log in a folder of its own beside the report.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.quickstart import interrupt
from launch.sites import PLATFORMS, count_devices, find_platform
from tools.acceptance.check import Check, Here
from tools.acceptance.checks import CHECKS
from tools.acceptance.execution import Result, make
from tools.acceptance.report import machine, markdown, write

PROCESSES = 2  # where there are no devices to be counted


def listing(checks: Sequence[Check], here: Here) -> str:
    lines: list[str] = []
    for check in checks:
        obstacle = check.obstacle(here)
        lines.append(f"{check.name}: {check.proves}{f' (not here: {obstacle})' if obstacle else ''}")
        commands = [] if obstacle else check.commands(here, here.out / check.name)
        lines += [f"    {shlex.join(command)}" for command in commands]
    return "\n".join(lines)


def make_all(checks: Sequence[Check], here: Here, report: Path) -> list[Result]:
    """The report is written after every check: an interrupted one is complete up to there."""
    about = machine(here)
    results: list[Result] = []
    for number, check in enumerate(checks, 1):
        print(f"[{number}/{len(checks)}] {check.name} ... ", end="", flush=True)
        results.append(make(check, here))
        print(f"{results[-1].verdict.value} ({results[-1].seconds:.0f} s) {results[-1].note}", flush=True)
        write(report, about, results)
    print(f"\n{markdown(about, results)}\nwritten to {report}")
    return results


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.acceptance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--platform", choices=PLATFORMS, help="found out if left out")
    parser.add_argument("--devices", type=int, help="to be used; left out: those of this machine")
    parser.add_argument("--model", type=Path, help="Hugging Face folder for the runs; left out: a small random one")
    parser.add_argument("--out", type=Path, default=Path("outputs/acceptance/report.md"), help="the report's file")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="checks, or words that they begin with")
    parser.add_argument("--list", action="store_true", help="say what would run, and run nothing")
    given = parser.parse_args(argv)
    kind = given.platform or find_platform()
    devices = given.devices or count_devices(kind, os.environ) or (PROCESSES if kind == "cpu" else 1)
    here = Here(kind, devices, given.out.resolve().parent, given.model and given.model.resolve())
    checks = [check for check in CHECKS if check.is_asked_for(given.only)]
    if unknown := [name for name in given.only if not any(check.is_asked_for([name]) for check in CHECKS)]:
        parser.error(f"--only {' '.join(unknown)}: no check begins so; --list names them")
    if devices < 1:
        parser.error(f"--devices {devices}: expected 1 or more")
    if here.given_model and not (here.given_model / "config.json").is_file():
        parser.error(f"--model {given.model}: has no config.json; give a Hugging Face folder")
    if given.list:
        print(listing(checks, here))
        return 0
    here.out.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)  # so that the check that is being made ends, too
    try:
        results = make_all(checks, here, given.out.resolve())
    except KeyboardInterrupt:
        print("\ninterrupted; the report holds what was made", file=sys.stderr)
        return 130
    return int(any(result.verdict.is_bad for result in results))


if __name__ == "__main__":
    sys.exit(main())
