"""Random number generators of the process, kept out of the engine's reach."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def undisturbed_rng() -> Iterator[None]:
    """Give Python's, numpy's and torch's global generators back as they were found.

    vLLM seeds all of them when an engine is built and draws from torch's while it samples. The trainer's dropout or
    shuffling must not depend on how much was sampled on a rank.
    """
    accelerator = torch.accelerator.current_accelerator()
    devices = [torch.accelerator.current_device_index()] if accelerator else []
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices, device_type=accelerator.type if accelerator else "cpu"):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
