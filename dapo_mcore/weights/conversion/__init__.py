"""Conversion between Hugging Face folders and Megatron's distributed checkpoints, derived from the families' table."""

from dapo_mcore.weights.conversion.compare import Difference, differences
from dapo_mcore.weights.conversion.convert import (
    Sizes,
    checkpoint_folder,
    hf_to_mcore,
    mcore_to_hf,
    open_source,
    read_config,
)

__all__ = [
    "Difference", "Sizes", "checkpoint_folder", "differences", "hf_to_mcore", "mcore_to_hf", "open_source",
    "read_config",
]  # fmt: skip
