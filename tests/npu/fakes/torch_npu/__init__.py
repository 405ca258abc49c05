"""Stands for torch_npu where there is no NPU: its interface over the CPU, with its rules as errors.

FAKE_TORCH_NPU=no_cann makes its import fail as it does where CANN is missing.
"""

import os
import sys

import torch

if os.environ.get("FAKE_TORCH_NPU") == "no_cann":
    raise ImportError("libhccl.so: cannot open shared object file: No such file or directory")

from npu_operators.attention import RECORDS

from torch_npu import collectives, device, ipc, ops, pinned

__all__ = ["RECORDS", "npu_fusion_attention", "ops"]

npu_fusion_attention = torch.ops.npu.npu_fusion_attention
npu = torch.npu = sys.modules["torch.npu"] = device
torch.Tensor.npu = lambda self, *args, **kwargs: self  # the chip this package stands for is the CPU
collectives.register()
ipc.rebind()
pinned.allow()
