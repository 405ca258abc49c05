"""What must not be done on an NPU: each function does it once, in a process of its own, and is to be stopped.

EARLY: before anything but torch is imported. LATE: after `import dapo_mcore.actor` has let MindSpeed change Megatron.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

Caller = Callable[[], Any]
ADAPTOR = "mindspeed.megatron_adaptor"
SWITCHES: dict[str, Any] = {"use_flash_attn": True, "moe_token_dispatcher_type": "alltoall"}


def adapt() -> None:
    from dapo_mcore.platform import adapt_megatron

    adapt_megatron()


def pretend_imported(name: str) -> None:
    sys.modules[name] = ModuleType(name)


def adaptor_with_arguments() -> None:
    import torch_npu  # noqa: F401

    sys.argv[1:] = ["--hidden-size", "4096"]
    importlib.import_module(ADAPTOR)


def adaptor_without_torch_npu() -> None:
    importlib.import_module(ADAPTOR)


def adaptor_after(name: str) -> Caller:
    def call() -> None:
        import torch_npu  # noqa: F401

        sys.argv[1:] = []
        pretend_imported(name)
        importlib.import_module(ADAPTOR)

    return call


def ours_after(name: str) -> Caller:
    def call() -> None:
        pretend_imported(name)
        adapt()

    return call


def without_cann() -> None:
    os.environ["FAKE_TORCH_NPU"] = "no_cann"
    adapt()


def with_torch_for_cuda() -> None:
    torch.version.cuda = "12.8"
    adapt()


def more_processes_than_devices() -> None:
    os.environ.update(FAKE_NPU_COUNT="2", LOCAL_RANK="2")
    adapt()


def platform_that_does_not_exist() -> None:
    os.environ["DAPO_PLATFORM"] = "tpu"
    adapt()


def without_mindspeed() -> None:
    sys.modules["mindspeed"] = None
    adapt()


def mindspeed_of_another_layout() -> None:
    import mindspeed

    mindspeed.__spec__.submodule_search_locations[:] = ["/dev"]
    adapt()


def mindspeed_that_leaves_torch_alone() -> None:
    """The files are there, and importing them does not make torch.cuda answer for the NPU."""
    import mindspeed

    from dapo_mcore.platform.mindspeed import FEATURES

    with tempfile.TemporaryDirectory() as folder:
        for feature in FEATURES:
            Path(folder, feature).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, feature).write_text("def repatch(switches): pass")
        mindspeed.__path__[:] = [folder]
        adapt()


def mindspeed_that_replaces_nothing() -> None:
    from mindspeed import transformer_engine

    transformer_engine.replace_layers = lambda: None
    adapt()


EARLY: dict[str, Caller] = {
    "adaptor with arguments": adaptor_with_arguments,
    "adaptor without torch_npu": adaptor_without_torch_npu,
    "adaptor after megatron": adaptor_after("megatron.core"),
    "adaptor after transformers": adaptor_after("transformers"),
    "adaptor after vllm": adaptor_after("vllm"),
    "ours after megatron": ours_after("megatron.core"),
    "ours after vllm": ours_after("vllm"),
    "ours after transformers": ours_after("transformers"),
    "no CANN": without_cann,
    "torch for CUDA": with_torch_for_cuda,
    "more processes than devices": more_processes_than_devices,
    "unknown platform": platform_that_does_not_exist,
    "no MindSpeed": without_mindspeed,
    "unknown MindSpeed": mindspeed_of_another_layout,
    "MindSpeed that leaves torch alone": mindspeed_that_leaves_torch_alone,
    "MindSpeed that replaces nothing": mindspeed_that_replaces_nothing,
}


def repatch(switches: Any) -> None:
    importlib.import_module(ADAPTOR).repatch(switches)


def repatch_with(**switches: Any) -> Caller:
    return lambda: repatch(SWITCHES | switches)


def repatch_twice() -> None:
    repatch(SWITCHES)
    repatch(SWITCHES)


def make_groups() -> None:
    from megatron.core import parallel_state

    from dapo_mcore.actor.parallel import init_process_group

    init_process_group()
    parallel_state.initialize_model_parallel()


def repatch_after_groups() -> None:
    make_groups()
    repatch(SWITCHES)


def open_config() -> Any:
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)


def repatch_after_config() -> None:
    open_config()
    repatch(SWITCHES)


def configure(**options: Any) -> None:
    from dapo_mcore.config import MegatronConfig
    from dapo_mcore.platform import platform

    platform().configure_megatron(MegatronConfig(**options))


def without_transformer_engine() -> None:
    from megatron.core.extensions import transformer_engine

    transformer_engine.HAVE_TE = False
    configure()


def configure_after_groups() -> None:
    make_groups()
    configure()


def configure_anew(before: bool, after: bool) -> Caller:
    def call() -> None:
        configure(apply_rope_fusion=before)
        configure(apply_rope_fusion=before)  # the same: nothing happens
        configure(apply_rope_fusion=after)

    return call


def layers_left_alone() -> None:
    from megatron.core.extensions import transformer_engine

    transformer_engine.TEGroupedLinear = SimpleNamespace(__module__="megatron.core.extensions.transformer_engine")
    configure()


def attend(layer_type: str, configured: str, mask: torch.Tensor | None = None, ranks: int = 1) -> Caller:
    """One packed self-attention of MindSpeed's."""

    def call() -> None:
        from megatron.core.extensions.transformer_engine import TEDotProductAttention
        from megatron.core.packed_seq_params import PackedSeqParams
        from megatron.core.transformer.enums import AttnMaskType

        config: Any = SimpleNamespace(attention_mask_type=configured, kv_channels=4, context_parallel_size=ranks)
        ends = torch.tensor([0, 3, 8], dtype=torch.int32)
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends)
        kind = AttnMaskType[layer_type]
        layer = TEDotProductAttention(config, layer_number=1, attn_mask_type=kind, attention_type="self")
        query, key, value = torch.randn(3, 8, 2, 4)
        layer(query, key, value, mask, attn_mask_type=kind, packed_seq_params=packed)

    return call


def fused_attention(**options: Any) -> Caller:
    def call() -> None:
        from torch_npu import npu_fusion_attention

        query, key, value = torch.randn(3, 8, 2, 4)
        given = {"input_layout": "TND", "actual_seq_qlen": [3, 8], "actual_seq_kvlen": [3, 8]} | options
        npu_fusion_attention(query, key, value, 2, **given)

    return call


def world_of_npus_alone() -> None:
    torch.distributed.init_process_group("hccl", store=torch.distributed.HashStore(), rank=0, world_size=1)


def labels_of_another_shard() -> None:
    torch.ops.npu.npu_cross_entropy_loss(torch.randn(3, 5), torch.tensor([0, 4, -1]), reduction="none")


def hand_over(tensor: torch.Tensor) -> Any:
    from torch.multiprocessing import reductions

    return reductions.reduce_tensor(tensor)


def tensor_in_nz() -> None:
    tensor: Any = torch.randn(4)
    tensor.npu_format = 29
    hand_over(tensor)


TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
LATE: dict[str, Caller] = {
    "repatch with a Namespace": lambda: repatch(argparse.Namespace(**SWITCHES)),
    "repatch twice": repatch_twice,
    "repatch after the groups": repatch_after_groups,
    "repatch after a config": repatch_after_config,
    "no flash attention": repatch_with(use_flash_attn=False),
    "batch-invariant attention": repatch_with(use_flash_attn_npu_batch_invariant=True),
    "sparse mode 3": repatch_with(sparse_mode=3),
    "allgather dispatcher": repatch_with(moe_token_dispatcher_type="allgather", moe_permute_fusion=True),
    "fused rope without its type": repatch_with(use_fused_rotary_pos_emb=True),
    "MindSpeed's context parallelism": repatch_with(
        context_parallel_size=2, context_parallel_algo="kvallgather_cp_algo"
    ),
    "pickled config": lambda: pickle.dumps(open_config()),
    "replaced config": lambda: dataclasses.replace(open_config(), num_layers=2),
    "configured after the groups": configure_after_groups,
    "configured anew": configure_anew(before=False, after=True),
    "configured back": configure_anew(before=True, after=False),
    "layers left alone": layers_left_alone,
    "Transformer Engine not found": without_transformer_engine,
    "vision tower of causal type": attend("no_mask", "causal"),
    "padding type of packed text": attend("padding_causal", "causal"),
    "zigzag sequences for MindSpeed": attend("causal", "causal", ranks=2),
    "mask for a tower": attend("no_mask", "no_mask", TRIANGLE),
    "mask without its mode": fused_attention(atten_mask=TRIANGLE),
    "mask of the batch's size": fused_attention(atten_mask=TRIANGLE[:8, :8], sparse_mode=2),
    "mask of what is seen": fused_attention(atten_mask=~TRIANGLE, sparse_mode=2),
    "sequences not packed": fused_attention(input_layout="SBH"),
    "a world of NPUs alone": world_of_npus_alone,
    "labels of another shard": labels_of_another_shard,
    "another process gets an NZ tensor": tensor_in_nz,
    "another process gets a result with a gradient": lambda: hand_over(torch.randn(4, requires_grad=True) * 2),
}
