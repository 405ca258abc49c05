from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parents[2] / "data" / "oracle"


@pytest.fixture(scope="session")
def oracle() -> Callable[[str], dict[str, torch.Tensor]]:
    """Inputs and answers of another project, stored by tests/oracle/make_values.py."""
    return lambda peer: load_file(FOLDER / f"{peer}.safetensors")
