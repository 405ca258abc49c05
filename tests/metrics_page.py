"""What docs/metrics.md lists."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"


def listed() -> list[str]:
    """The first column of its tables."""
    return re.findall(r"^\| `(\S+)` \|", PAGE.read_text(), re.MULTILINE)


def as_listed(name: str) -> str:
    """A metric as the page names it: numbers of responses as letters."""
    return re.sub(r"@\d+$", "@n" if "/mean@" in name else "@k", name)
