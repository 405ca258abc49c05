"""Qwen3-VL on disk, against the names, shapes and numbers of transformers' own modules."""

import shutil
from math import prod

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from dapo_mcore.weights.conversion import Sizes, differences, hf_to_mcore, mcore_to_hf, open_source, read_config
from dapo_mcore.weights.conversion.torch_dist import read_index
from dapo_mcore.weights.names import hf_shapes, parameters
from dapo_mcore.weights.placement import RolloutLayout, TrainLayout
from dapo_mcore.weights.plan import reshard_plan
from tests.tiny_vl import KINDS, published, save_published, tiny_vl

FORMS = [("qwen3_vl", True), ("qwen3_vl", False), ("qwen3_vl_moe", False)]
SIZES = {"qwen3_vl": Sizes(tp=2, pp=2), "qwen3_vl_moe": Sizes(tp=2, pp=2, ep=2)}
FUSED = "model.language_model.layers.1.mlp.experts.gate_up_proj"
QKV = "model.visual.blocks.2.attn.qkv.weight"


def quiet(total):
    return lambda count: None


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """model_type -> a folder as it is published, and its model."""
    root = tmp_path_factory.mktemp("models")
    models = {model_type: tiny_vl(model_type) for model_type in KINDS}
    return {name: (save_published(model, root / name), model) for name, model in models.items()}


def there_and_back(source, tmp_path, sizes=Sizes()):  # noqa: B008
    hf_to_mcore(source, tmp_path / "mcore", sizes, None, 1, quiet)
    mcore_to_hf(tmp_path / "mcore", tmp_path / "back", source, 1, quiet)
    return tmp_path / "back"


def edited(source, folder, change):
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def single_experts(tensors):
    """One matrix per expert and projection, the right way round."""
    for name in [name for name in tensors if name.endswith("experts.gate_up_proj")]:
        stem = name.removesuffix("gate_up_proj")
        for expert, (gate_up, down) in enumerate(zip(tensors.pop(name), tensors.pop(f"{stem}down_proj"), strict=True)):
            gate, up = gate_up.T.chunk(2)
            named = {"gate": gate, "up": up, "down": down.T}
            tensors |= {f"{stem}{expert}.{x}_proj.weight": matrix.contiguous() for x, matrix in named.items()}


@pytest.mark.parametrize(("model_type", "tied"), FORMS)
def test_the_declared_names_and_shapes_are_those_of_the_published_files(model_type, tied):
    model = tiny_vl(model_type, tied)
    assert hf_shapes(model.config) == {name: tuple(tensor.shape) for name, tensor in published(model).items()}


@pytest.mark.parametrize("model_type", KINDS)
def test_there_and_back_is_bit_identical_whatever_the_layout(folders, tmp_path, model_type):
    source, model = folders[model_type]
    back = load_file(there_and_back(source, tmp_path, SIZES[model_type]) / "model.safetensors")
    expected = published(model)
    assert back.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, back[name])] == []


def test_transformers_loads_what_came_back_as_the_same_model(folders, tmp_path):
    source, model = folders["qwen3_vl_moe"]
    back = there_and_back(source, tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(back, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_checkpoint_holds_the_tower_whole_and_block_by_block_under_the_names_of_its_module(folders, tmp_path):
    source, model = folders["qwen3_vl"]
    there_and_back(source, tmp_path, Sizes(tp=2, pp=2))
    entries = read_index(tmp_path / "mcore").state_dict_metadata
    tower = {name: tuple(tensor.shape) for name, tensor in model.model.visual.state_dict().items()}
    found = {key.removeprefix("visual."): entry for key, entry in entries.items() if hasattr(entry, "size")}
    assert {name: tuple(found[name].size) for name in tower} == tower
    assert {len(found[name].chunks) for name in tower} == {1}


def test_experts_of_which_each_has_matrices_of_its_own_are_read_like_fused_ones(folders, tmp_path):
    source, model = folders["qwen3_vl_moe"]
    back = there_and_back(edited(source, tmp_path / "single", single_experts), tmp_path, Sizes(ep=2))
    assert all(torch.equal(tensor, load_file(back / "model.safetensors")[n]) for n, tensor in published(model).items())


def test_experts_that_lie_as_in_transformers_modules_are_refused_by_name_and_shape(folders, tmp_path):
    source, _ = folders["qwen3_vl_moe"]
    turned = edited(source, tmp_path / "turned", lambda t: t.update({FUSED: t[FUSED].mT.contiguous()}))
    with pytest.raises(ValueError, match=r"wrong shape \(1\): .*gate_up_proj \[4, 96, 64\], not \[4, 64, 96\]"):
        hf_to_mcore(turned, tmp_path / "mcore", Sizes(), None, 1, quiet)


def test_a_comparison_names_what_differs_in_fused_experts_and_in_the_tower(folders, tmp_path):
    source, _ = folders["qwen3_vl_moe"]

    def change(tensors):
        tensors[FUSED][2, 5, 60] += 1  # of 96 columns the second half is up
        tensors[QKV][7, 3] += 1

    hf_config = read_config(source)
    pair = open_source(source, hf_config), open_source(edited(source, tmp_path / "other", change), hf_config)
    found = {difference.name: difference.what for difference in differences(*pair, hf_config, quiet)}
    assert found.keys() == {f"{FUSED}: expert 2, part 2 of 2", QKV}
    assert "first at [12, 5]" in found[f"{FUSED}: expert 2, part 2 of 2"]


def test_every_engine_gets_the_whole_tower_once_from_the_first_stage(folders):
    source, model = folders["qwen3_vl_moe"]
    hf_config = read_config(source)
    plan = reshard_plan(hf_config, TrainLayout(ranks=4, pp=2, ep=2), RolloutLayout(ranks=4, tp=2, ep=2))
    rows = list(parameters(hf_config))
    tower = {i: row.layout.full_shape for i, row in enumerate(rows) if "visual." in row.vllm_forms[0].names[0]}
    assert len(tower) == len(model.model.visual.state_dict())
    for rank in range(4):
        written = [t for t in plan.transfers if t.destination == rank and t.parameter in tower]
        assert {t.parameter: t.size for t in written} == {i: prod(shape) for i, shape in tower.items()}
        assert len(written) == len(tower)
        assert all(t.source == rank if rank < 2 else t.source < 2 for t in written)
