"""Hugging Face -> Megatron -> Hugging Face for every family and layout; transformers is the reference on both sides."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dapo_mcore.weights.names import hf_shapes
from tests.distributed.weights_ranks import (
    LENGTHS,
    converted_and_saved,
    refusals,
    round_trip,
    run_all,
    transformer_engine_round_trip,
)
from tools.certificate.reference import EXPERTS, SIZES, VOCAB, tiny_model
from tools.certificate.spawn import spawn

SINGLE, TP2, PP2, PP2_VPP2, EP2 = {}, {"tp": 2, "etp": 2}, {"pp": 2}, {"pp": 2, "vpp": 2}, {"ep": 2}
TP2_EP2 = {"tp": 2, "ep": 2, "etp": 1}
MODELS = ("llama", "llama_one_kv_group", "qwen2", "qwen2_tied", "qwen3", "qwen3_tied", "qwen3_moe",
          "qwen3_moe_unnormed", "qwen3_moe_mixed", "four_layers", "stacked", "head_repeated")  # fmt: skip
SAVED_AS = {"stacked": "qwen3_moe", "head_repeated": "qwen3_tied"}  # the same model in another form on disk
CASES = {
    1: [(model, SINGLE) for model in MODELS],
    2: [
        ("llama", TP2), ("llama_one_kv_group", TP2), ("qwen2_tied", TP2), ("qwen3", TP2), ("qwen3_tied", PP2),
        ("qwen3_moe", TP2), ("qwen3_moe", EP2), ("qwen3_moe", TP2_EP2), ("qwen3_moe_mixed", PP2),
        ("qwen3_moe_unnormed", TP2_EP2), ("four_layers", PP2_VPP2), ("stacked", EP2), ("stacked", TP2),
        ("head_repeated", PP2),
    ],
}  # fmt: skip
SWAPPED = [f"model.layers.1.mlp.experts.3.{x}_proj.weight" for x in ("gate", "up")]


def name_of(model, layout):
    return f"{model}-{'_'.join(f'{key}{size}' for key, size in layout.items()) or 'single'}"


IDS = [name_of(*case) for cases in CASES.values() for case in cases]


@pytest.fixture(scope="module")
def sequences():
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(VOCAB, (length,), generator=draw) for length in LENGTHS]


@pytest.fixture(scope="module")
def truth(tmp_path_factory, sequences):
    """name of the model -> (folder saved by transformers, its logits [tokens, vocabulary])"""
    root, out = tmp_path_factory.mktemp("models"), {}
    for name in MODELS:
        if name in SAVED_AS:
            continue
        model = four_layers() if name == "four_layers" else tiny_model(name)
        model.save_pretrained(root / name)
        with torch.no_grad():
            out[name] = root / name, torch.cat([model(ids[None]).logits[0] for ids in sequences])
    for name, edit in (("stacked", stack_experts), ("head_repeated", repeat_head)):
        original, reference = out[SAVED_AS[name]]
        out[name] = edited(original, root / name, edit), reference
    return out


def four_layers():
    """Two for each of two pipeline stages, in chunks of one; dense and sparse in turn."""
    changes = {"num_hidden_layers": 4, "decoder_sparse_step": 2, "norm_topk_prob": True, "tie_word_embeddings": True}
    torch.manual_seed(1)
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES | EXPERTS | changes)).float()


def stack_experts(tensors):
    """As transformers holds them: gate over up and down, [experts, ...], in every layer."""
    out = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        gate, up, down = ([tensors[f"{stem}.{e}.{x}_proj.weight"] for e in range(8)] for x in ("gate", "up", "down"))
        out[f"{stem}.gate_up_proj"] = torch.cat([torch.stack(gate), torch.stack(up)], 1)
        out[f"{stem}.down_proj"] = torch.stack(down)
    return out


def repeat_head(tensors):
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def edited(original, folder, edit):
    """A copy of a model folder whose tensors went through `edit`."""
    shutil.copytree(original, folder)
    save_file(edit(load_file(original / "model.safetensors")), folder / "model.safetensors")
    return folder


def swap_gate_and_up(tensors):
    gate, up = (tensors[name] for name in SWAPPED)
    return {**tensors, SWAPPED[0]: up, SWAPPED[1]: gate}


def drop_router(tensors):
    return {name: tensor for name, tensor in tensors.items() if name != "model.layers.0.mlp.gate.weight"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("saved") / "out"


@pytest.fixture(scope="module")
def reports(truth, sequences, saved, tmp_path_factory):
    """What each rank returned, by case or by name. One start of each number of processes: imports cost seconds."""

    def plain(model):
        """The folder with the same weights in the public form."""
        return truth[SAVED_AS.get(model, model)][0]

    moe, root = truth["qwen3_moe"][0], tmp_path_factory.mktemp("edited")
    tasks = {
        world: {
            name_of(model, layout): (round_trip, (truth[model][0], plain(model), sequences, layout))
            for model, layout in cases
        }
        for world, cases in CASES.items()
    }  # fmt: skip
    tasks[1]["swapped"] = round_trip, (edited(moe, root / "swapped", swap_gate_and_up), moe, sequences, SINGLE)
    tasks[1]["refusals"] = refusals, (moe, edited(moe, root / "broken", drop_router))
    tasks[1]["transformer_engine"] = transformer_engine_round_trip, (truth["qwen3_moe_mixed"][0],)
    tasks[2]["saved"] = converted_and_saved, (truth["qwen3_moe_mixed"][0], saved, TP2_EP2)
    out = {}
    for world, named in tasks.items():
        ranks = spawn(run_all, world, list(named.values()))
        out |= dict(zip(named, zip(*ranks, strict=True), strict=True))
    return out


@pytest.mark.parametrize("case", IDS)
def test_every_parameter_of_every_rank_is_filled(reports, case):
    assert [rank["unfilled"] for rank in reports[case]] == [[]] * len(reports[case])


@pytest.mark.parametrize("case", IDS)
def test_the_export_equals_the_files_bit_for_bit_on_every_rank(reports, case):
    assert [rank["differing"] for rank in reports[case]] == [[]] * len(reports[case])


@pytest.mark.parametrize("case", [case for case in IDS if "pp" not in case])
def test_packed_logits_equal_those_of_transformers(reports, truth, case):
    model, _ = case.split("-")
    for rank in reports[case]:
        assert (rank["logits"] - truth[model][1]).abs().max() <= 5e-6


@pytest.mark.parametrize("case", IDS)
def test_the_order_of_export_is_that_of_the_family_whatever_the_layout(reports, truth, case):
    model, _ = case.split("-")
    config = transformers.AutoConfig.from_pretrained(truth[model][0])
    assert [rank["order"] for rank in reports[case]] == [list(hf_shapes(config))] * len(reports[case])


def test_parameters_are_found_under_the_names_of_transformer_engine(reports):
    (report,) = reports["transformer_engine"]
    assert report["differing"] == []
    assert {
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.1.mlp.experts.linear_fc1.weight0",
        "decoder.layers.1.mlp.experts.linear_fc2.weight7",
    } <= set(report["names"])
    assert not any("local_experts" in name for name in report["names"])


def test_swapped_gate_and_up_show_in_the_logits_and_are_named_by_the_comparison(reports, truth):
    """The comparisons above can fail: this is what two wrong tensors do to them."""
    (report,) = reports["swapped"]
    assert report["differing"] == SWAPPED
    assert (report["logits"] - truth["qwen3_moe"][1]).abs().max() > 1e-3


def test_a_saved_export_loads_in_transformers_with_equal_weights_in_the_trained_dtype(reports, saved):
    assert len(reports["saved"]) == 2
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    model, info = transformers.AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected, state = tiny_model("qwen3_moe_mixed").bfloat16().state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_a_save_that_fails_on_rank_0_fails_everywhere_with_its_reason(reports):
    assert all("nowhere: no config.json" in rank["failure"] for rank in reports["saved"])


def test_models_and_folders_that_do_not_fit_are_refused_by_name(reports):
    (messages,) = reports["refusals"]
    assert "missing (1): model.layers.0.mlp.gate.weight" in messages["folder"]
    for message in (messages["chunks"], messages["export"]):
        lines = message.splitlines()
        assert lines[0].startswith("the Megatron model does not fit model_type=qwen3_moe")
        assert sorted(lines[1:]) == [
            "  chunk 0: decoder.extra is unknown to the family or known twice",
            "  decoder.layers.0.mlp.router.weight: shape [7, 64], expected [8, 64]",
            "  decoder.layers.1.mlp.experts.local_experts.2.linear_fc2.weight is missing",
        ]
