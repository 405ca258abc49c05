"""Runs unmodified Megatron-Core on a CPU with gloo.

Every module of megatron.core gets its own global `torch`: a proxy that answers for CUDA with the CPU's means
(`torch_proxy`). Faults of Megatron-Core without Transformer Engine are mended module by module (`patches`), right
after the module was imported (`hook`). The table of everything that is changed, with reasons, is `patches.PATCHES`.
"""

from __future__ import annotations

import warnings

from dapo_mcore.platform.megatron_cpu import hook
from dapo_mcore.platform.megatron_cpu.patches import PATCHES


def apply() -> None:
    """Install the adapter; a second call does nothing. RuntimeError if megatron.core was imported without it."""
    if hook.is_installed():
        return
    hook.install(PATCHES)
    # Running without them is what this package is for.
    warnings.filterwarnings("ignore", message=r".*(Transformer Engine|Apex).* not installed")
    # Megatron's own defaults and calls.
    warnings.filterwarnings("ignore", message="full scope is deprecated")
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+. is deprecated", category=FutureWarning)
