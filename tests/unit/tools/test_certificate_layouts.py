"""Layouts of the certificate's command line."""

import pytest

from tools.certificate.layouts import SEEING, parse


def test_fusions_are_switched_beside_the_sizes_of_a_layout():
    layout = parse("tp=2,sp=1,moe_permute_fusion=1,moe_grouped_gemm=0", 2)
    megatron = layout.megatron
    assert (megatron.tensor_model_parallel_size, megatron.sequence_parallel) == (2, True)
    assert (megatron.moe_permute_fusion, megatron.moe_grouped_gemm, megatron.use_fused_swiglu) == (True, False, True)


def test_fused_rope_leaves_out_what_rotates_in_several_dimensions():
    assert set(SEEING) <= set(parse("", 1).families)
    assert not set(SEEING) & set(parse("apply_rope_fusion=1", 1).families)


@pytest.mark.parametrize("text", ["tp=0", "moe_permute_fusion=yes", "deterministic=1", "tp"])
def test_a_part_that_is_no_option_is_refused_with_those_that_are(text):
    with pytest.raises(ValueError, match=rf"--layout {text}.*moe_permute_fusion=N"):
        parse(text, 2)
