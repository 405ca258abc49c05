"""Transformer Engine, of which Megatron-Core finds the names, and MindSpeed's layers in the place of its own."""

from __future__ import annotations

import contextlib
import sys
from types import ModuleType
from typing import Any

from torch import nn

VERSION = "2.2.0"


class _NoFp8:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return False

    @staticmethod
    def get_fp8_recipe() -> None:
        return None


def _nothing(*args: Any, **kwargs: Any) -> contextlib.nullcontext[None]:
    return contextlib.nullcontext()


def _class(name: str) -> type:
    return type(name, (nn.Module,), {})


PERMUTATIONS = (
    *("moe_permute", "moe_permute_with_probs", "moe_unpermute"),
    *("moe_sort_chunks_by_index", "moe_sort_chunks_by_index_with_probs"),
)
LAYERS = ("Linear", "LayerNormLinear", "DotProductAttention", "GroupedLinear", "LayerNorm", "RMSNorm")
MODULES: dict[str, dict[str, Any]] = {
    "": {"__version__": VERSION},
    ".common": {},
    ".common.recipe": {"DelayedScaling": _class("DelayedScaling")},
    ".pytorch": {name: _class(name) for name in LAYERS},
    ".pytorch.permutation": {name: _class(name) for name in PERMUTATIONS},
    ".pytorch.ops": {name: _class(name) for name in ("Sequential", "FusibleOperation")},
    ".pytorch.fp8": {"FP8GlobalStateManager": _NoFp8, "fp8_autocast": _nothing},
    ".pytorch.distributed": {
        "CudaRNGStatesTracker": type("CudaRNGStatesTracker", (), {}),
        "activation_recompute_forward": _nothing,
    },
    ".pytorch.tensor": {"QuantizedTensor": _class("QuantizedTensor")},
}


def pretend() -> None:
    for suffix, content in MODULES.items():
        module = ModuleType("transformer_engine" + suffix)
        module.__dict__.update(content, __path__=[])
        sys.modules[module.__name__] = module
        parent, _, name = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], name, module)


def replace_layers() -> None:
    """In the module that defines them, and in those that have taken them from there already."""
    from megatron.core.extensions import transformer_engine as extensions

    from mindspeed.te.pytorch.attention.dot_product_attention.dot_product_attention import TEDotProductAttention
    from mindspeed.te.pytorch.module import grouped_linear, layernorm_column_parallel_linear, linear

    replacements = {
        "TEDotProductAttention": TEDotProductAttention,
        "TEGroupedLinear": grouped_linear.TEGroupedLinear,
        "TEColumnParallelGroupedLinear": grouped_linear.TEColumnParallelGroupedLinear,
        "TERowParallelGroupedLinear": grouped_linear.TERowParallelGroupedLinear,
        "TELayerNormColumnParallelLinear": layernorm_column_parallel_linear.TELayerNormColumnParallelLinear,
        "TENorm": layernorm_column_parallel_linear.TENorm,
        "TEColumnParallelLinear": linear.TEColumnParallelLinear,
        "TERowParallelLinear": linear.TERowParallelLinear,
    }
    originals = {id(vars(extensions)[name]): name for name in replacements}
    for module in [m for name, m in sys.modules.items() if name.startswith("megatron.core")]:
        for name, value in list(vars(module).items()):
            if id(value) in originals and name == originals[id(value)]:
                setattr(module, name, replacements[name])
