"""The distributed optimizer as MindSpeed leaves it."""

from __future__ import annotations

from typing import Any

UNKNOWN = "fully_reshardable"  # a format of states that MindSpeed's copy of the function lacks


def replace() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    of_megatron = DistributedOptimizer.load_state_dict

    def load_state_dict(self: Any, state: dict[str, Any]) -> None:
        if state.get("param_state_sharding_type") == UNKNOWN:
            raise NotImplementedError(f"Unknown sharding_type: {UNKNOWN}")
        of_megatron(self, state)

    DistributedOptimizer.load_state_dict = load_state_dict
