"""The stored scores are still what verl's geo3k reward says. Needs an environment with verl's files and mathruler."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

STORED = Path(__file__).parents[1] / "data" / "oracle" / "geo3k.json"

pytestmark = pytest.mark.oracle


def test_the_stored_scores_are_those_of_verls_geo3k_reward(tmp_path: Path) -> None:
    if find_spec("mathruler") is None or find_spec("verl") is None:
        pytest.skip("not installed here: mathruler or verl")
    fresh = tmp_path / "geo3k.json"
    subprocess.run([sys.executable, Path(__file__).with_name("make_geo3k.py"), fresh], check=True)
    assert json.loads(fresh.read_text()) == json.loads(STORED.read_text())
