"""python -m tools.bench <name> [options]: runs the module of that name in this folder."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

# A bench is a module with a `main`; what several modules make up begins with the bench's name and an underscore.
NAMES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if "_" not in path.stem)


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        raise SystemExit(
            f"usage: python -m tools.bench {{{','.join(NAMES)}}} [options]; --help after a name lists them"
        )
    import_module(f"tools.bench.{sys.argv[1]}").main(sys.argv[2:])


if __name__ == "__main__":
    main()
