"""Norms, alone and as the first part of a linear layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor, nn


class TENorm:
    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5) -> nn.RMSNorm:
        norm = nn.RMSNorm(hidden_size, eps=eps, dtype=torch.float32)  # whatever config.params_dtype says
        norm.weight.sequence_parallel = config.sequence_parallel
        return norm


class TELayerNormColumnParallelLinear(ColumnParallelLinear):
    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        normed = F.rms_norm(input_, (input_.shape[-1],), self.layer_norm_weight, self.eps)
        return super().forward(normed, *args, **kwargs)
