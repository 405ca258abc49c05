"""What the plan tool reports, against figures that were worked out from the models' sizes on paper."""

import json
from math import prod

import pytest

from dapo_mcore.weights.names import hf_shapes
from dapo_mcore.weights.placement import RolloutLayout, TrainLayout
from dapo_mcore.weights.plan import reshard_plan
from tools.plan import MODELS, main, read_model
from tools.traffic import Traffic, table, traffic

# Parameters of the published checkpoints.
PARAMETERS = {
    "Llama-3.1-8B": 8_030_261_248,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Qwen3-VL-30B-A3B": 31_070_754_032,
}
# Qwen3-30B-A3B in bf16 on 8 ranks, trained with ep=8. Rollout (tp, ep): GB a rank holds, then GB the busiest rank
# receives from a trainer with tp 1, 2, 4, 8.
TABLE = {
    (8, 8): (7.68, 0.0, 0.41, 0.41, 0.05),
    (1, 8): (10.33, 0.0, 1.53, 2.29, 2.67),
    (8, 1): (7.68, 6.34, 6.75, 6.75, 6.39),
    (4, 4): (15.3, 14.5, 15.3, 14.5, 15.3),
    (2, 2): (30.5, 29.0, 29.0, 30.5, 30.5),
    (1, 1): (61.1, 50.7, 52.3, 53.0, 53.4),
}
GATHER = {1: 50.7, 2: 52.3, 4: 53.0, 8: 53.4}


def as_printed(figure):
    return pytest.approx(figure, abs=0.006 if figure < 15 else 0.06)


def model_with(layers):
    hf = read_model("Qwen3-30B-A3B")
    hf.num_hidden_layers = layers
    return hf


def report(hf, train_tp, rollout_tp, rollout_ep) -> Traffic:
    train, rollout = TrainLayout(ranks=8, tp=train_tp, ep=8), RolloutLayout(ranks=8, tp=rollout_tp, ep=rollout_ep)
    return traffic(hf, reshard_plan(hf, train, rollout), hf.vocab_size, item_bytes=2, bucket=1 << 27)


def largest_gb(column, *sizes):
    """Over the ranks, of 48 layers: every layer costs a rank the same."""
    one, two = (getattr(report(model_with(layers), *sizes), column) for layers in (1, 2))
    return max(a + 47 * (b - a) for a, b in zip(one, two, strict=True)) / 1e9


@pytest.mark.parametrize("rollout", TABLE)
def test_busiest_ranks_receive_what_was_worked_out_for_the_30b_model(rollout):
    held, *received = TABLE[rollout]
    assert [largest_gb("received", tp, *rollout) for tp in (1, 2, 4, 8)] == [as_printed(figure) for figure in received]
    assert largest_gb("sampled", 1, *rollout) == as_printed(held)


@pytest.mark.parametrize(("train_tp", "figure"), GATHER.items())
def test_collecting_everything_costs_all_that_a_rank_does_not_train(train_tp, figure):
    one, two = (report(model_with(layers), train_tp, 8, 8).gathered for layers in (1, 2))
    assert (one + 47 * (two - one)) / 1e9 == as_printed(figure)


def test_the_command_prints_four_figures_of_the_whole_model(capsys):
    arguments = ["reshard", "--model", "Qwen3-30B-A3B", "--train", "tp=4,ep=8", "--rollout", "tp=8,ep=8"]
    assert main([*arguments, "--ranks", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["busiest_rank_recv_gb", "total_wire_gb", "gather_gb", "messages"]
    assert found["busiest_rank_recv_gb"] == pytest.approx(0.407, abs=0.001)
    assert found["gather_gb"] == pytest.approx(53.03, abs=0.01)
    # Ranks 0 and 7 train what they sample; each of the other six asks at least one rank, 128 MiB at a time.
    assert found["total_wire_gb"] == pytest.approx(6 * 0.407, abs=0.005)
    assert 6 * 4 <= found["messages"] <= 40


def test_the_table_has_a_row_for_every_rank():
    found = report(model_with(1), 4, 8, 8)
    shown = table(found)
    assert shown.row_count == 8
    local = list(shown.columns[3].cells)
    assert [figure == sampled for figure, sampled in zip(local, shown.columns[2].cells, strict=True)] == [
        received == 0 for received in found.received
    ]
    assert sum(found.sent) == sum(found.received)


@pytest.mark.parametrize("model", PARAMETERS)
def test_the_known_models_have_as_many_parameters_as_were_published(model):
    shapes = hf_shapes(read_model(model)).values()
    assert sum(map(prod, shapes)) == PARAMETERS[model]


def test_every_known_model_is_among_those():
    assert {path.stem for path in MODELS.glob("*.json")} == set(PARAMETERS)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--model Qwen --ranks 8", "--model Qwen: neither a folder with a config.json nor one of Llama-3.1-8B, "),
        ("--model Qwen3-8B --ranks 8 --train pt=2", "--train pt=2: 'pt=2' is not one of tp=N, pp=N"),
        ("--model Qwen3-8B --ranks 8 --train tp=2,tp=4", "'tp=4' is not one of tp=N, pp=N, vpp=N, cp=N, ep=N, etp=N"),
        ("--model Qwen3-8B --ranks 8 --rollout pp=2", "--rollout pp=2: 'pp=2' is not one of tp=N, ep=N"),
        ("--model Qwen3-8B --ranks 6 --train tp=4", "train tp=4 x cp=1 x pp=1: 4 does not divide the 6 ranks"),
        ("--model Qwen2.5-7B --ranks 8 --rollout tp=8", "rollout tp=8: model.layers.0.self_attn.q_proj.weight: vLLM "
         "cannot cut 28 query heads and 4 key-value heads over 8 ranks; choose"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_option_value_and_way_out(options, told, capsys):
    assert main(["reshard", *options.split()]) == 2
    assert told in capsys.readouterr().err


def test_a_hugging_face_folder_is_a_model_too(tmp_path, capsys):
    sizes = json.loads((MODELS / "Qwen2.5-7B.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "num_hidden_layers": 1}))
    assert main(["reshard", "--model", str(tmp_path), "--ranks", "2", "--train", "tp=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # Each of the two trains half of all that is cut, and samples with the whole.
    shapes = {name: shape for name, shape in hf_shapes(read_model("Qwen2.5-7B")).items() if "norm" not in name}
    kept = [shape for name, shape in shapes.items() if ".layers." not in name or ".layers.0." in name]
    assert found["busiest_rank_recv_gb"] == pytest.approx(sum(map(prod, kept)) / 1e9)
