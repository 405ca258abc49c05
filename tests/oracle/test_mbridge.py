"""The stored digests are still what mbridge says. Needs an environment with mbridge beside megatron-core."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

STORED = Path(__file__).parents[1] / "data" / "oracle" / "mbridge.json"

pytestmark = pytest.mark.oracle


def test_the_stored_digests_are_those_of_the_layouts_that_mbridge_makes(tmp_path: Path) -> None:
    if find_spec("mbridge") is None:
        pytest.skip("not installed here: mbridge")
    fresh = tmp_path / "mbridge.json"
    subprocess.run([sys.executable, Path(__file__).with_name("make_mbridge.py"), fresh], check=True)
    assert json.loads(fresh.read_text()) == json.loads(STORED.read_text())
