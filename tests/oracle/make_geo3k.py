"""Ask verl's geo3k reward (with mathruler) what it pays for each response, and store the scores for the unit tests.

Runs where mathruler is installed and verl's files lie (geo3k_requirements.txt); verl itself is not imported.

    python tests/oracle/make_geo3k.py [file]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

from geo3k_inputs import RESPONSES

FILE = Path(__file__).parents[1] / "data" / "oracle" / "geo3k.json"


def geo3k_score() -> Callable[[str, str], float]:
    """verl.utils.reward_score.geo3k.compute_score, without verl's own imports."""
    verl = find_spec("verl")
    assert verl is not None
    assert verl.origin is not None
    spec = spec_from_file_location("geo3k", Path(verl.origin).parent / "utils" / "reward_score" / "geo3k.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.compute_score


def main(file: Path) -> None:
    score = geo3k_score()
    answers = {
        "peers": {peer: version(peer) for peer in ("verl", "mathruler")},
        "scores": [score(response, answer) for response, answer in RESPONSES],
    }
    file.write_text(json.dumps(answers) + "\n")
    print(f"{len(RESPONSES)} responses: {file}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FILE)
