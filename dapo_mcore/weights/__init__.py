"""Weights between Hugging Face files, Megatron-Core and vLLM: one table per model family, everything else follows.

Importing this package does not import Megatron; `load_hf` and `hf_weights` do, when they are called.
"""

from dapo_mcore.weights.export import hf_weights
from dapo_mcore.weights.load import load_hf
from dapo_mcore.weights.save import save_hf

__all__ = ["hf_weights", "load_hf", "save_hf"]
