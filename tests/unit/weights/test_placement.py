"""Placement against Megatron's own rank generator and layer offsets, and the refusals."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
from megatron.core.parallel_state import RankGenerator
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from dapo_mcore.weights.names import parameters
from dapo_mcore.weights.placement import RolloutLayout, TrainLayout, holders
from tests.unit.weights.element_ids import config

ORDER = "tp-cp-ep-dp-pp"  # Megatron's default
LAYOUTS = [
    TrainLayout(ranks=8, tp=4, ep=8),
    TrainLayout(ranks=8, tp=2, ep=2, etp=2, pp=2, vpp=2),
    TrainLayout(ranks=16, tp=2, cp=2, pp=2, ep=4),
    TrainLayout(ranks=16, tp=2, cp=4, ep=2, etp=4),
    TrainLayout(ranks=12, tp=3, pp=2, ep=2),
]


def row(end, layer=1):
    return next(p for p in parameters(config("qwen3_moe", vocab_size=72, num_hidden_layers=8))
                if p.layer == layer and p.hf_forms[0].names[-1].endswith(end))  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_hold_the_parts_that_megatrons_groups_give_them(layout):
    model_ranks = layout.tp * layout.cp * layout.pp
    dense = RankGenerator(tp=layout.tp, ep=1, dp=layout.ranks // model_ranks, pp=layout.pp, cp=layout.cp, order=ORDER)
    for group in dense.get_ranks("tp"):
        assert [rank % layout.parts(row("o_proj.weight")) for rank in group] == list(range(layout.tp))
    expert_ranks = layout.etp * layout.ep * layout.pp
    sparse = RankGenerator(
        tp=layout.etp, ep=layout.ep, dp=layout.ranks // expert_ranks, pp=layout.pp, cp=1, order=ORDER
    )
    for group in sparse.get_ranks("tp"):
        assert [rank % layout.parts(row("down_proj.weight")) for rank in group] == list(range(layout.etp))
    for group in sparse.get_ranks("ep"):
        assert [expert for rank in group for expert in layout.experts(rank, 8)] == list(range(8))
    for group in dense.get_ranks("pp"):
        stages = [layout.ranks_of(row("o_proj.weight", layer), 8) for layer in range(8)]
        assert [sum(rank in stage for stage in stages) for rank in group] == [8 // layout.pp] * layout.pp


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (2, 4)])
def test_layers_lie_on_the_stages_where_megatron_counts_them(pp, vpp):
    layout, chunk = TrainLayout(ranks=pp, pp=pp, vpp=vpp), 8 // (pp * vpp)
    megatron = cast(Any, SimpleNamespace(
        num_layers=8, pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        pipeline_model_parallel_layout=None, num_layers_in_first_pipeline_stage=None,
        num_layers_in_last_pipeline_stage=None, account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
    ))  # fmt: skip
    for stage in range(pp):
        for vp_stage in range(vpp):
            first = get_transformer_layer_offset(megatron, vp_stage if vpp > 1 else None, stage)
            for layer in range(first, first + chunk):
                assert layout.ranks_of(row("o_proj.weight", layer), 8) == range(stage, stage + 1)


def test_engines_are_consecutive_ranks_and_experts_go_linearly():
    layout = RolloutLayout(ranks=8, tp=2, ep=4)
    assert holders(layout, row("o_proj.weight"), -1, 8) == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert holders(layout, row("down_proj.weight"), 5, 8) == ((2, 6),)
    assert holders(RolloutLayout(ranks=4, tp=2), row("down_proj.weight"), 5, 8) == ((0, 2), (1, 3))


def test_without_equal_shares_the_first_ranks_of_vllm_hold_one_expert_more():
    layout = RolloutLayout(ranks=3, ep=3)
    assert [layout.experts(rank, 8) for rank in range(3)] == [range(3), range(3, 6), range(6, 8)]


@pytest.mark.parametrize(
    ("layout", "sizes", "told"),
    [
        (TrainLayout, dict(ranks=8, tp=3), r"train tp=3 x cp=1 x pp=1: 3 does not divide the 8 ranks; .* use 9 ranks"),
        (TrainLayout, dict(ranks=8, ep=4, etp=4), r"train etp=4 x ep=4 x pp=1: 16 does not divide the 8 ranks"),
        (TrainLayout, dict(ranks=8, vpp=0), r"train vpp=0: .*use at least 1"),
        (RolloutLayout, dict(ranks=8, tp=16), r"rollout tp=16: 16 does not divide the 8 ranks; .* use 16 ranks"),
        (RolloutLayout, dict(ranks=8, tp=4, ep=2), r"rollout ep=2: .* tp=4 .*use ep=4, a multiple of it, or ep=1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_way_out(layout, sizes, told):
    with pytest.raises(ValueError, match=told):
        layout(**sizes)
