"""Conversion on disk: nothing lost, nothing silent, nothing half done. Real Megatron reads it in tests/distributed."""

import json
import os
import pickle
import shutil
import signal

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from dapo_mcore.checkpoint.manifest import CorruptCheckpoint, verify_manifest
from dapo_mcore.weights.conversion import Sizes, differences, hf_to_mcore, mcore_to_hf, open_source, read_config
from dapo_mcore.weights.conversion.torch_dist import read_index
from dapo_mcore.weights.conversion.torch_record import LARGEST, frame, locate
from dapo_mcore.weights.names import hf_shapes
from tools import convert

SIZES = {
    "vocab_size": 13, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
CONFIGS = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 1}),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS),
    "mixed": ("Qwen3MoeConfig", {**EXPERTS, "decoder_sparse_step": 2, "tie_word_embeddings": True}),
}
LAYOUTS = {
    "one_rank": Sizes(),
    "tp4": Sizes(tp=4, etp=2),  # more ranks than key-value heads; the vocabulary is padded
    "pp2_vpp2": Sizes(tp=2, pp=2, vpp=2),
}


def quiet(total):
    return lambda count: None


def model(folder, name, dtype=torch.bfloat16, **changes):
    kind, options = CONFIGS[name]
    config = getattr(transformers, kind)(**{**SIZES, **options, **changes}, dtype=dtype)
    config.save_pretrained(folder)
    torch.manual_seed(0)
    save_file({n: torch.randn(s).to(dtype) for n, s in hf_shapes(config).items()}, folder / "model.safetensors")
    return folder


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def to_mcore(source, target, sizes=LAYOUTS["one_rank"], dtype=None, progress=quiet):
    hf_to_mcore(source, target, sizes, dtype, 1, progress)
    return target


def to_hf(source, target, config=None):
    mcore_to_hf(source, target, config or source, 2, quiet)
    return target


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


def unequal(a, b):
    """Names of tensors that two folders do not share bit for bit."""
    first, second = ({k: v for file in f.glob("*.safetensors") for k, v in load_file(file).items()} for f in (a, b))
    same = [n for n in first.keys() & second.keys() if first[n].dtype == second[n].dtype]
    return (first.keys() | second.keys()) - {n for n in same if torch.equal(bits(first[n]), bits(second[n]))}


@pytest.mark.parametrize(
    ("name", "layout"), [*((name, "tp4") for name in CONFIGS), ("qwen3_moe", "one_rank"), ("mixed", "pp2_vpp2")]
)
def test_hugging_face_to_megatron_and_back_is_bit_identical_whatever_the_layout(tmp_path, name, layout):
    source = model(tmp_path / "hf", name)
    checkpoint = to_mcore(source, tmp_path / "mcore", LAYOUTS[layout])
    assert unequal(source, to_hf(checkpoint, tmp_path / "back")) == set()


def test_experts_are_spread_over_the_files_of_their_ranks(tmp_path):
    checkpoint = to_mcore(model(tmp_path / "hf", "qwen3_moe"), tmp_path / "mcore", Sizes(tp=2, pp=2, ep=2))
    key = "decoder.layers.3.mlp.experts.experts.linear_fc2.weight"  # on the second of two pipeline stages
    index = read_index(checkpoint)
    held = {place.offset[0]: info.relative_path for place, info in index.storage_data.items() if place.fqn == key}
    assert held == {0: "__2_0.distcp", 1: "__2_0.distcp", 2: "__3_0.distcp", 3: "__3_0.distcp"}


def test_fused_experts_are_read_like_single_ones(tmp_path):
    source = model(tmp_path / "hf", "qwen3_moe")
    fused = shutil.copytree(source, tmp_path / "fused")

    def fuse(tensors):
        for layer in range(4):
            stem = f"model.layers.{layer}.mlp.experts"
            parts = {x: [tensors.pop(f"{stem}.{e}.{x}_proj.weight") for e in range(4)] for x in ("gate", "up", "down")}
            both = zip(parts["gate"], parts["up"], strict=True)
            tensors[f"{stem}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in both])
            tensors[f"{stem}.down_proj"] = torch.stack(parts["down"])

    edit(fused, fuse)
    assert unequal(source, to_hf(to_mcore(fused, tmp_path / "mcore", Sizes(ep=2)), tmp_path / "back")) == set()


def test_a_type_is_converted_only_when_it_is_asked_for_and_the_config_says_so(tmp_path):
    source = model(tmp_path / "hf", "llama", torch.float32)
    back = to_hf(to_mcore(source, tmp_path / "mcore", dtype=torch.bfloat16), tmp_path / "back")
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in load_file(source / "model.safetensors").items():
        assert torch.equal(load_file(back / "model.safetensors")[name], tensor.bfloat16())


def test_layers_of_different_types_are_refused_because_megatron_stacks_them(tmp_path):
    source, name = model(tmp_path / "hf", "llama"), "model.layers.2.mlp.down_proj.weight"
    edit(source, lambda tensors: tensors.update({name: tensors[name].float()}))
    with pytest.raises(ValueError, match=r"linear_fc2.weight: torch.bfloat16 in one layer and torch.float32.*--dtype"):
        to_mcore(source, tmp_path / "mcore")
    assert not list(tmp_path.glob("*mcore*"))


def test_the_manifest_holds_and_a_flipped_bit_is_found(tmp_path):
    checkpoint = to_mcore(model(tmp_path / "hf", "qwen3"), tmp_path / "mcore")
    verify_manifest(checkpoint)
    data = bytearray((checkpoint / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (checkpoint / "__0_0.distcp").write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=r"__0_0\.distcp"):
        verify_manifest(checkpoint)


def test_a_killed_conversion_leaves_no_result_and_continues_where_it_was(tmp_path):
    source, target = model(tmp_path / "hf", "qwen3_moe"), tmp_path / "mcore"

    def killed_after(limit):
        def progress(total):
            done = 0

            def advance(count):
                nonlocal done
                done += count
                if done > limit * total:
                    os.kill(os.getpid(), signal.SIGKILL)

            return advance

        return progress

    child = os.fork()
    if not child:
        to_mcore(source, target, Sizes(pp=4), progress=killed_after(0.6))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not target.exists()
    with (tmp_path / ".mcore.unfinished.journal").open("a") as journal:
        journal.write('{"name": "__2_0.dis')  # as a loss of power may leave it
    finished = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob(".mcore.unfinished/__[01]_0.distcp")}
    assert len(finished) == 2
    to_mcore(source, target, Sizes(pp=4))
    assert {name: (target / name).stat().st_mtime_ns for name in finished} == finished
    verify_manifest(target)
    assert unequal(source, to_hf(target, tmp_path / "back")) == set()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "mcore"]


def test_what_a_conversion_with_other_options_left_is_not_continued(tmp_path):
    source, target = model(tmp_path / "hf", "llama"), tmp_path / "mcore"

    def failing(total):
        def advance(count):
            raise OSError("disk full")

        return advance

    with pytest.raises(OSError, match="disk full"):
        to_mcore(source, target, Sizes(pp=2), progress=failing)
    (tmp_path / ".mcore.unfinished" / "leftover").touch()
    to_mcore(source, target)
    assert not (target / "leftover").exists()
    verify_manifest(target)


def test_a_result_is_never_overwritten(tmp_path):
    source = model(tmp_path / "hf", "llama")
    with pytest.raises(ValueError, match="hf: exists already; remove it or choose another name"):
        to_mcore(source, source)


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        (Sizes(pp=3), r"--pp 3 --vpp 1: 3 chunks cannot hold 4 layers"),
        (Sizes(ep=3), r"--ep 3: does not divide the model's 4 experts"),
        (Sizes(tp=3), r"cut into 3 equal parts"),
    ],
)
def test_sizes_that_do_not_fit_the_model_are_refused(tmp_path, sizes, told):
    with pytest.raises(ValueError, match=told):
        to_mcore(model(tmp_path / "hf", "qwen3_moe"), tmp_path / "mcore", sizes)


def test_one_error_lists_what_a_checkpoint_lacks_has_too_much_or_in_another_shape(tmp_path):
    checkpoint = to_mcore(model(tmp_path / "hf", "qwen3_moe", num_hidden_layers=2), tmp_path / "mcore")
    changes = {"num_hidden_layers": 3, "tie_word_embeddings": True, "num_experts": 2}
    other = model(tmp_path / "other", "qwen3_moe", **changes)
    with pytest.raises(ValueError, match="do not fit") as error:
        open_source(checkpoint, read_config(other))
    lines = str(error.value).splitlines()
    assert lines[1].startswith("  missing (9): decoder.layers.2.input_layernorm.weight, ")
    assert lines[2] == "  unexpected (1): output_layer.weight"
    assert lines[3].startswith("  wrong shape (6): decoder.layers.0.mlp.experts.experts.linear_fc1.weight [4, 16, 16], "
                               "not [2, 16, 16], ")  # fmt: skip
    assert len(lines) == 4


def test_a_chunk_that_is_missing_or_lies_wrong_is_noticed(tmp_path):
    source = model(tmp_path / "hf", "llama")
    checkpoint = to_mcore(source, tmp_path / "mcore", Sizes(tp=2))
    index = read_index(checkpoint)
    index.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks.pop()
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match=r"incomplete \(1\): decoder.layers.mlp.linear_fc2.weight"):
        open_source(checkpoint, read_config(source))


class Calls:
    """Pickled as a call, which unpickling makes."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("call", "named"),
    [((os.system, "true"), "posix.system"), ((getattr, torch.Size, "numel"), "builtins.getattr")],
)
def test_an_index_that_would_run_code_is_refused(tmp_path, call, named):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Calls(*call)))
    with pytest.raises(ValueError, match=rf"not the index of a distributed checkpoint \(it refers to {named}\)"):
        read_index(tmp_path)


def test_members_of_enumerations_are_read_as_older_pythons_write_them(tmp_path):
    member = _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Calls(getattr, _MEM_FORMAT_ENCODING, member.name)))
    assert read_index(tmp_path) is member


def test_comparison_names_the_first_element_that_differs(tmp_path):
    source, name = model(tmp_path / "hf", "qwen3"), "model.layers.1.self_attn.k_proj.weight"
    checkpoint = to_mcore(source, tmp_path / "mcore", Sizes(tp=2))
    config = read_config(source)
    edit(source, lambda tensors: tensors[name][2, 3:5].fill_(7.0))
    pair = (open_source(folder, config) for folder in (source, checkpoint))
    (difference,) = differences(*pair, config, quiet)
    assert difference.name == name
    assert difference.what.startswith("2 of 64 elements; first at [2, 3]: 7 against ")


def test_the_commands_convert_compare_and_list(tmp_path, capsys):
    source, checkpoint, back = str(model(tmp_path / "hf", "mixed")), str(tmp_path / "mcore"), str(tmp_path / "back")
    assert convert.main(["hf-to-mcore", source, checkpoint, "--tp", "2", "--ep", "2"]) == 0
    assert convert.main(["mcore-to-hf", checkpoint, back]) == 0
    assert convert.main(["verify", back, checkpoint]) == 0
    assert convert.main(["inspect", checkpoint]) == 0
    listed = capsys.readouterr().out
    assert "decoder.layers.1.mlp.experts.experts.linear_fc1.weight  bfloat16  [4, 16, 16]" in listed
    assert "written for 2 ranks" in listed
    edit(tmp_path / "hf", lambda tensors: tensors["model.norm.weight"].zero_())
    assert convert.main(["verify", source, back]) == 1
    assert "model.norm.weight: 16 of 16 elements" in capsys.readouterr().out
    assert convert.main(["mcore-to-hf", source, str(tmp_path / "again")]) == 2
    assert "no .metadata in it" in capsys.readouterr().err


def test_a_record_is_what_torch_load_reads(tmp_path):
    for tensor in (torch.randn(3, 1, 5), torch.randn(7).bfloat16(), torch.zeros(0, 4)):
        around = frame(tuple(tensor.shape), tensor.dtype)
        content = around.head + bytes(tensor.view(torch.uint8).flatten().tolist()) + around.tail
        (tmp_path / "record").write_bytes(content)
        assert torch.equal(torch.load(tmp_path / "record", weights_only=True), tensor)
        assert locate(memoryview(content)).start % 64 == 0
    assert LARGEST < 1 << 32  # the sizes in a record have 32 bits


def test_a_record_of_torch_is_read_whatever_its_strides(tmp_path):
    stored = torch.randn(4, 6, dtype=torch.float32)
    torch.save(stored[1:3].t(), tmp_path / "record")
    content = (tmp_path / "record").read_bytes()
    found = locate(memoryview(content))
    data = torch.frombuffer(bytearray(content), dtype=found.dtype, offset=found.start, count=found.span)
    assert torch.equal(data.as_strided(found.shape, found.stride), stored[1:3].t())
