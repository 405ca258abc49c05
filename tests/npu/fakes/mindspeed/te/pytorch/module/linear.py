"""Linear layers cut over tensor-parallel ranks: Megatron's own."""

from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from mindspeed.te.pytorch.module.ops.comm_overlap_ops import COMM_OVERLAP_CONFIG


class TEColumnParallelLinear(ColumnParallelLinear):
    pass


class TERowParallelLinear(RowParallelLinear):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        COMM_OVERLAP_CONFIG.use()
        return super().forward(*args, **kwargs)
