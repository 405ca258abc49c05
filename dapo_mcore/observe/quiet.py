"""Warnings of the libraries that say nothing to who runs a training, so that the ones that do are seen."""

from __future__ import annotations

import logging
import os
import warnings

# Beginnings of messages, as regular expressions.
KNOWN = (
    r"full scope is deprecated",  # Megatron, about CUDA graphs that are not used
    r"Failed to load image Python extension",  # torchvision, about reading image files
    r"The \.grad attribute of a Tensor that is not a leaf",  # torch, where Megatron looks for gradients
    r"`torch\.distributed\.(reduce_op|all_gather_into_tensor|reduce_scatter_tensor|_\w+)`",  # Megatron and vLLM
    r"`sequence_parallel` is set to `True`, but tensor model parallel size is 1",  # Megatron, about whole experts
    r"\s*The 'megatron\.core\.transformer\.custom_layers\.transformer_engine'",
)
# Loggers that warn where nothing is wrong.
LOGGERS = ("torch._library.triton",)  # that there is no Triton, on a CPU


def quiet_libraries() -> None:
    """Before torch is imported: its C++ side reads the environment then. What the user exported stays."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for message in KNOWN:
        warnings.filterwarnings("ignore", message=message)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
