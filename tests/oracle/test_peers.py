"""The stored values are still what the peers say. Needs an environment with verl, trl and liger-kernel."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

STORED = Path(__file__).parents[1] / "data" / "oracle"
PEERS = ("verl", "trl", "liger-kernel")

pytestmark = pytest.mark.oracle


def missing() -> list[str]:
    return [peer for peer in PEERS if find_spec(peer.replace("-", "_")) is None]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The peers' answers, asked for again."""
    if missing():
        pytest.skip(f"not installed here: {', '.join(missing())}")
    folder = tmp_path_factory.mktemp("oracle")
    script = Path(__file__).with_name("make_values.py")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script, folder], env=environment, check=True)
    return folder


@pytest.mark.parametrize("peer", PEERS)
def test_the_stored_values_are_what_the_peer_computes(fresh, peer):
    stored, answers = (load_file(folder / f"{peer}.safetensors") for folder in (STORED, fresh))
    assert stored.keys() == answers.keys()
    for name, value in stored.items():
        torch.testing.assert_close(answers[name], value, rtol=1e-6, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("peer", PEERS)
def test_the_stored_values_name_the_peer_and_its_version(fresh, peer):
    stored, now = (
        safe_open(folder / f"{peer}.safetensors", framework="pt").metadata() for folder in (STORED, fresh)
    )  # fmt: skip
    assert stored == now
