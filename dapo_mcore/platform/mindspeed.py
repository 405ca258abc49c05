"""MindSpeed, branch core_r0.16.0: what must happen in which order so that it changes Megatron-Core as a whole.

Importing `mindspeed.megatron_adaptor` reads sys.argv and changes Megatron; its `repatch` changes it anew. Both keep
what they were given in one place of the process, from where it gets into every TransformerConfig that leaves a field
open.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_mcore.config import MegatronConfig
from dapo_mcore.platform.device import UnusableDeviceError

ADAPTOR = "mindspeed.megatron_adaptor"
# Whoever is imported before keeps objects that MindSpeed replaces; it looks into every loaded module while it does.
LATER = ("megatron.core", "vllm", "transformers")
# Parts of the layout this adapter is written for. Versions are no help: later branches call themselves 0.12.1.
FEATURES = (
    "megatron_adaptor.py",
    "te/pytorch/attention/dot_product_attention/dot_product_attention.py",
    "te/pytorch/module/grouped_linear.py",
    "te/pytorch/module/layernorm_column_parallel_linear.py",
    "te/pytorch/module/ops/comm_overlap_ops.py",
    "core/batch_invariant/batch_invariant.py",  # of the branches with all of the above, in this one alone
)
LOG_LEVEL = "MIND_SPEED_LOG_LEVEL"  # of what the libraries of every rank print; MindSpeed's default is INFO
ROPE = "mindspeed.core.fusions.fused_rope"
BRANCH = "install MindSpeed's branch core_r0.16.0"
EXTENSIONS = "megatron.core.extensions.transformer_engine"
SPECS = "megatron.core.extensions.transformer_engine_spec_provider"
REPLACED = ("TEColumnParallelLinear", "TEGroupedLinear", "TEDotProductAttention")

# Of torch. MindSpeed puts its own in the place.
_all_reduce = dist.all_reduce
_repatched_with: list[dict[str, Any]] = []


def adapt() -> None:
    """Let MindSpeed change Megatron-Core; idempotent.

    Raises:
        UnusableDeviceError: MindSpeed is missing or unknown, or comes too late.
    """
    if ADAPTOR in sys.modules:
        return
    early = [name for name in LATER if name in sys.modules]
    if early:
        raise UnusableDeviceError(
            f"{early[0]} was imported before MindSpeed could change what it is made of; import dapo_mcore.actor (or "
            "call dapo_mcore.platform.adapt_megatron) first"
        )
    _check_layout()
    os.environ.setdefault(LOG_LEVEL, "WARNING")
    # torch_npu lets every kind of warning through from here on, and dozens of modules warn of things not used.
    with _no_arguments(), warnings.catch_warnings(record=True):
        importlib.import_module("torch_npu")
        adaptor = importlib.import_module(ADAPTOR)
    if "torch_npu.contrib.transfer_to_npu" not in sys.modules or not callable(getattr(adaptor, "repatch", None)):
        raise UnusableDeviceError(f"MindSpeed at {adaptor.__file__} works in a way unknown here; {BRANCH}")
    _check_replaced()
    _mend_all_reduce()


def configure(megatron: MegatronConfig) -> None:
    """Repatch, once per process: before Megatron's groups exist and before a TransformerConfig does.

    Raises:
        UnusableDeviceError: other options than those of the first call.
    """
    _forget_groups()
    _choose_attention(megatron.context_parallel_size)
    wanted = switches(megatron)
    if _repatched_with:
        changed = {name: value for name, value in wanted.items() if _repatched_with[0].get(name) != value}
        if changed:
            raise UnusableDeviceError(f"MindSpeed is set up already, without {changed}; start another process")
        return
    parallel_state: Any = importlib.import_module("megatron.core.parallel_state")
    if parallel_state.model_parallel_is_initialized():
        raise UnusableDeviceError("Megatron's groups exist already; MindSpeed must be configured before they are made")
    logging.getLogger(ROPE).setLevel(logging.ERROR)  # it warns that the fusion is off, and means Apex's
    importlib.import_module(ADAPTOR).repatch(wanted)
    _check_replaced()
    _mend_all_reduce()
    _repatched_with.append(wanted)


def switches(megatron: MegatronConfig) -> dict[str, Any]:
    """MindSpeed's switches. What else describes the model or its layout is in the TransformerConfig alone."""
    chosen = {
        "use_flash_attn": True,
        "attention_mask_type": "causal",  # of layers of text: a 2,048 x 2,048 triangle and sparse mode 2
        "use_fused_rmsnorm": megatron.use_fused_rmsnorm,
        "use_fused_swiglu": megatron.use_fused_swiglu,
        "apply_rope_fusion": megatron.apply_rope_fusion,
        "use_fused_rotary_pos_emb": megatron.apply_rope_fusion,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": megatron.moe_grouped_gemm,
        "moe_permute_fusion": megatron.moe_permute_fusion,
        "npu_deterministic": megatron.deterministic_mode,
    }
    return chosen | ({"position_embedding_type": "rope"} if megatron.apply_rope_fusion else {})


@contextmanager
def _no_arguments() -> Iterator[None]:
    """MindSpeed takes every argument of the command line for a value of every TransformerConfig."""
    saved = sys.argv[1:]
    del sys.argv[1:]
    try:
        yield
    finally:
        sys.argv[1:] = saved


def _check_layout() -> None:
    """Found by its files: importing any of them would start what is to be checked."""
    spec = importlib.util.find_spec("mindspeed")
    if spec is None or not spec.submodule_search_locations:
        raise UnusableDeviceError(f"MindSpeed is not installed, and Megatron-Core needs it on an NPU; {BRANCH}")
    root = Path(next(iter(spec.submodule_search_locations)))
    missing = [feature for feature in FEATURES if not (root / feature).is_file()]
    if missing:
        raise UnusableDeviceError(f"MindSpeed at {root} has no {missing[0]}: a layout unknown here; {BRANCH}")


def _check_replaced() -> None:
    extensions: Any = importlib.import_module(EXTENSIONS)
    strangers = [name for name in REPLACED if not extensions.__dict__[name].__module__.startswith("mindspeed.")]
    if strangers or not extensions.HAVE_TE:
        raise UnusableDeviceError(f"MindSpeed left {(strangers or ['HAVE_TE'])[0]} of {EXTENSIONS} as it was; {BRANCH}")


def _mend_all_reduce() -> None:
    """MindSpeed sums a float32 copy of a float64 tensor and drops it: every rank keeps its own summand.

    HCCL sums no float64. Every group serves the host too, so gloo does.
    """
    of_mindspeed = dist.all_reduce

    @functools.wraps(_all_reduce)
    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.dtype is not torch.float64:
            return of_mindspeed(tensor, *args, **kwargs)
        on_host = tensor.cpu()
        work = _all_reduce(on_host, *args, **kwargs)
        if work is not None:
            work.wait()
        tensor.copy_(on_host)
        return work

    dist.all_reduce = all_reduce


def _forget_groups() -> None:
    """MindSpeed's linear layers keep the first tensor-parallel group that they meet; the next layout has another."""
    overlap: Any = importlib.import_module("mindspeed.te.pytorch.module.ops.comm_overlap_ops").COMM_OVERLAP_CONFIG
    overlap.init_tp_size(None)
    overlap.init_tp_group(None)


def _choose_attention(context_parallel_size: int) -> None:
    """MindSpeed's, except under context parallelism: its ranks hold other rows of packed sequences than ours."""
    provider: Any = importlib.import_module(SPECS).TESpecProvider
    if context_parallel_size == 1:
        provider.core_attention = lambda self: importlib.import_module(EXTENSIONS).TEDotProductAttention
        return
    attention = importlib.import_module("dapo_mcore.platform.ascend_attention")  # imports megatron.core
    provider.core_attention = lambda self: attention.ZigzagAttention
