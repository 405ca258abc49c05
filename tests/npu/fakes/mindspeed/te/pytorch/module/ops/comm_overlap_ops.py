"""The tensor-parallel group of linear layers: the first that they meet, until they are told to forget it."""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from npu_contract import require


class _Config:
    size: int | None = None
    group: Any = None

    def init_tp_size(self, size: int | None) -> None:
        self.size = size

    def init_tp_group(self, group: Any) -> None:
        self.group = group

    def use(self) -> None:
        group = parallel_state.get_tensor_model_parallel_group()
        self.group, self.size = self.group or group, self.size or group.size()
        require(self.group is group and self.size == group.size(), "linear layers use the groups of this layout")


COMM_OVERLAP_CONFIG = _Config()
