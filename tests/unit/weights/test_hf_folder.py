import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from dapo_mcore.weights.hf_folder import HFFolder, check_folder
from dapo_mcore.weights.names import hf_shapes, parameters
from dapo_mcore.weights.sections import Form

EXPERT = "model.layers.1.mlp.experts"
MOE = SimpleNamespace(
    model_type="qwen3_moe", num_hidden_layers=2, hidden_size=8, intermediate_size=12, num_attention_heads=4,
    head_dim=4, num_key_value_heads=2, vocab_size=11, tie_word_embeddings=False,
    num_experts=2, moe_intermediate_size=6, decoder_sparse_step=1, mlp_only_layers=[0],
)  # fmt: skip
TIED = SimpleNamespace(**{**vars(MOE), "tie_word_embeddings": True})


def weights(config=MOE):
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in hf_shapes(config).items()}


def folder(path, tensors):
    save_file(tensors, path / "model.safetensors")
    return HFFolder(path)


def split_folder(path, *files):
    """Numbered files and their index."""
    weight_map = {}
    for number, tensors in enumerate(files):
        save_file(tensors, path / f"model-{number}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"model-{number}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def fused(tensors):
    """Experts stacked as transformers' modules hold them."""
    gate_up = [torch.cat([tensors.pop(f"{EXPERT}.{e}.{x}_proj.weight") for x in ("gate", "up")]) for e in (0, 1)]
    down = [tensors.pop(f"{EXPERT}.{e}.down_proj.weight") for e in (0, 1)]
    return {**tensors, f"{EXPERT}.gate_up_proj": torch.stack(gate_up), f"{EXPERT}.down_proj": torch.stack(down)}


def test_stacked_experts_read_as_one_tensor_per_expert_does(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain, stacked = folder(tmp_path / "a", weights()), folder(tmp_path / "b", fused(weights()))
    check_folder(plain, MOE)
    check_folder(stacked, MOE)
    for parameter in parameters(MOE):
        for expert in range(max(parameter.experts, 1)):
            assert torch.equal(plain.mcore_tensor(parameter, expert), stacked.mcore_tensor(parameter, expert))


def test_gate_lies_above_up(tmp_path):
    tensors = weights()
    source = folder(tmp_path, tensors)
    row = next(p for p in parameters(MOE) if p.experts and len(p.hf_forms[0].names) == 2)
    gate, up = (tensors[f"{EXPERT}.1.{x}_proj.weight"] for x in ("gate", "up"))
    assert torch.equal(source.mcore_tensor(row, 1), torch.cat([gate, up]))
    assert not torch.equal(source.mcore_tensor(row, 1), torch.cat([up, gate]))


def test_stacked_experts_may_lie_transposed_as_in_qwen3_vl(tmp_path):
    row = next(p for p in parameters(MOE) if p.experts and len(p.hf_forms[0].names) == 2)
    form = Form(("mlp.experts.gate_up_proj",), stacked=True, transposed=True)
    transposed = replace(row, row=replace(row.row, hf=(form,)))
    assert transposed.hf_shapes(transposed.hf_forms[0]) == {f"{EXPERT}.gate_up_proj": (2, 8, 12)}  # [E, H, 2I]
    stacked = torch.randn(2, 8, 12)
    source = folder(tmp_path, {f"{EXPERT}.gate_up_proj": stacked})
    assert torch.equal(source.mcore_tensor(transposed, 1), stacked[1].t())


def test_tensors_are_found_in_several_files(tmp_path):
    tensors = list(weights().items())
    split_folder(tmp_path, dict(tensors[:5]), dict(tensors[5:]))
    source = HFFolder(tmp_path)
    check_folder(source, MOE)
    assert all(torch.equal(source.tensor(name), tensor) for name, tensor in tensors)


def test_one_error_lists_what_is_missing_unexpected_of_wrong_shape_and_no_float(tmp_path):
    tensors = weights()
    del tensors[f"{EXPERT}.1.up_proj.weight"]
    tensors["model.layers.2.mlp.gate.weight"] = torch.zeros(1)
    tensors["model.norm.weight"] = torch.zeros(9)
    tensors["lm_head.weight"] = torch.zeros(11, 8, dtype=torch.int8)
    with pytest.raises(ValueError, match="do not fit") as error:
        check_folder(folder(tmp_path, tensors), MOE)
    assert str(error.value).splitlines() == [
        f"{tmp_path}: its weights do not fit its config.json (model_type=qwen3_moe)",
        f"  missing (1): {EXPERT}.1.up_proj.weight",
        "  unexpected (1): model.layers.2.mlp.gate.weight",
        "  wrong shape (1): model.norm.weight [9], not [8]",
        "  not floating point (1): lm_head.weight I8",
    ]


def test_a_stacked_tensor_with_an_expert_too_few_has_the_wrong_shape(tmp_path):
    tensors = fused(weights())
    tensors[f"{EXPERT}.down_proj"] = tensors[f"{EXPERT}.down_proj"][:1].clone()
    with pytest.raises(ValueError, match=r"down_proj \[1, 8, 6\], not \[2, 8, 6\]"):
        check_folder(folder(tmp_path, tensors), MOE)


def test_an_expert_that_lies_in_both_forms_is_unexpected(tmp_path):
    tensors = {**weights(), f"{EXPERT}.down_proj": torch.zeros(2, 8, 6)}
    with pytest.raises(ValueError, match=rf"unexpected \(1\): {EXPERT}.down_proj"):
        check_folder(folder(tmp_path, tensors), MOE)


def test_long_lists_are_cut_and_counted(tmp_path):
    with pytest.raises(ValueError, match=r"missing \(28\): .*, and 20 more"):
        check_folder(folder(tmp_path, {"lm_head.weight": torch.zeros(11, 8)}), MOE)


def test_rotary_frequencies_are_ignored(tmp_path):
    check_folder(folder(tmp_path, {**weights(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}), MOE)


def test_a_tied_head_may_be_repeated_but_not_differ(tmp_path):
    tensors = weights(TIED)
    head = tensors["model.embed_tokens.weight"].clone()
    check_folder(folder(tmp_path, {**tensors, "lm_head.weight": head}), TIED)
    head[3, 3] += 1
    with pytest.raises(ValueError, match=r"unexpected \(1\): lm_head.weight"):
        check_folder(folder(tmp_path, {**tensors, "lm_head.weight": head}), TIED)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def empty(path):
    path.write_bytes(b"")


def scramble_header(path):
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


@pytest.mark.parametrize("damage", [truncate, empty, scramble_header])
def test_a_damaged_file_is_named(tmp_path, damage):
    save_file(weights(), tmp_path / "model.safetensors")
    damage(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: corrupt or truncated .* download or copy"):
        HFFolder(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        HFFolder(tmp_path / "nowhere")


def test_parts_without_their_index_are_refused(tmp_path):
    save_file(weights(), tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"neither .* nor model\.safetensors\.index\.json.*00001-of-00002"):
        HFFolder(tmp_path)


def test_a_part_that_the_index_names_and_nobody_downloaded_is_named(tmp_path):
    split_folder(tmp_path, weights(), {"lm_head.weight": torch.zeros(1)})
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names model-1\.safetensors, which is missing"):
        HFFolder(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff\xfe", b'{"weight_map": 3}'])
def test_a_broken_index_is_named(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"index\.json: not a safetensors index"):
        HFFolder(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    split_folder(tmp_path, weights(), {"lm_head.weight": torch.zeros(11, 8)})
    with pytest.raises(ValueError, match=r"model-1\.safetensors: holds lm_head\.weight, which another file"):
        HFFolder(tmp_path)
