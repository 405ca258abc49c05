"""Linear layers cut over tensor-parallel ranks: Megatron's own."""

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear


class TEColumnParallelLinear(ColumnParallelLinear):
    pass


class TERowParallelLinear(RowParallelLinear):
    pass
