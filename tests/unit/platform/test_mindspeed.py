"""Which of MindSpeed's switches an option turns. The rest of its adapter is held by tests/npu."""

from __future__ import annotations

from typing import Any

import pytest

from dapo_mcore.config import MegatronConfig
from dapo_mcore.platform.mindspeed import switches

ALWAYS = {
    "use_flash_attn": True,
    "attention_mask_type": "causal",
    "moe_token_dispatcher_type": "alltoall",
}


@pytest.mark.parametrize(
    ("options", "turned"),
    [
        ({}, {"use_fused_rmsnorm": True, "use_fused_swiglu": True, "moe_grouped_gemm": True}),
        ({}, {"moe_permute_fusion": False, "npu_deterministic": False}),
        ({"use_fused_rmsnorm": False}, {"use_fused_rmsnorm": False, "use_fused_swiglu": True}),
        ({"use_fused_swiglu": False}, {"use_fused_rmsnorm": True, "use_fused_swiglu": False}),
        ({"moe_grouped_gemm": False}, {"moe_grouped_gemm": False, "moe_permute_fusion": False}),
        ({"moe_permute_fusion": True}, {"moe_grouped_gemm": True, "moe_permute_fusion": True}),
        ({"deterministic_mode": True}, {"npu_deterministic": True}),
        ({"apply_rope_fusion": True}, {"use_fused_rotary_pos_emb": True, "position_embedding_type": "rope"}),
    ],
)
def test_an_option_turns_its_switch(options: dict[str, Any], turned: dict[str, Any]) -> None:
    chosen = switches(MegatronConfig(**options))
    assert (ALWAYS | turned).items() <= chosen.items()


def test_no_switch_describes_the_model_or_the_rest_of_its_layout() -> None:
    layout = MegatronConfig(
        tensor_model_parallel_size=4,
        context_parallel_size=2,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=8,
        expert_tensor_parallel_size=2,
        sequence_parallel=True,
    )
    assert switches(layout) == switches(MegatronConfig())


def test_fused_rope_is_switched_off_by_name_and_its_type_given_only_where_it_is_on() -> None:
    off = switches(MegatronConfig())
    assert (off["apply_rope_fusion"], off["use_fused_rotary_pos_emb"]) == (False, False)
    assert "position_embedding_type" not in off
