import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dapo_mcore.weights import save_hf
from dapo_mcore.weights.hf_folder import HFFolder
from dapo_mcore.weights.names import hf_shapes

CONFIG = SimpleNamespace(model_type="qwen3", num_hidden_layers=2, hidden_size=8, intermediate_size=12,
                         num_attention_heads=4, head_dim=4, num_key_value_heads=2, vocab_size=11,
                         tie_word_embeddings=True)  # fmt: skip


def weights(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return {name: torch.randn(shape, dtype=dtype) for name, shape in hf_shapes(CONFIG).items()}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    stated = {"model_type": "qwen3", "dtype": "float32", "text_config": {"torch_dtype": "float32"}, "hidden_size": 8}
    (folder / "config.json").write_text(json.dumps(stated))
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "merges.txt"):
        (folder / name).write_text(f"of {name}")
    for name in ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"):
        (folder / name).write_text("not to be copied")
    return folder


def content(folder):
    return {path.name for path in folder.iterdir()}


def test_one_file_with_config_and_tokenizer_beside_it(tmp_path, source):
    save_hf(weights().items(), CONFIG, source, tmp_path / "out")
    out = tmp_path / "out"
    companions = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "merges.txt"}
    assert content(out) == {"model.safetensors", *companions}
    assert (out / "tokenizer.json").read_text() == "of tokenizer.json"
    written = load_file(out / "model.safetensors")
    assert written.keys() == weights().keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in weights().items())


def test_the_config_states_the_dtype_of_what_was_written(tmp_path, source):
    save_hf(weights().items(), CONFIG, source, tmp_path / "out")
    stated = json.loads((tmp_path / "out/config.json").read_text())
    assert stated == {
        "model_type": "qwen3", "dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16"}, "hidden_size": 8,
    }  # fmt: skip


def test_files_hold_at_most_the_given_size_and_an_index_finds_everything(tmp_path, source):
    save_hf(weights().items(), CONFIG, source, tmp_path / "out", max_shard_bytes=600)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights().values())
    assert all(sum(t.nbytes for t in load_file(tmp_path / "out" / file).values()) <= 600 for file in files)
    saved = HFFolder(tmp_path / "out")
    assert all(torch.equal(saved.tensor(name), tensor) for name, tensor in weights().items())


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_written_files_follow_the_umask(tmp_path, source, umask, mode):
    before = os.umask(umask)
    try:
        save_hf(weights().items(), CONFIG, source, tmp_path / "one")
        save_hf(weights().items(), CONFIG, source, tmp_path / "several", max_shard_bytes=600)
    finally:
        os.umask(before)
    written = [*(tmp_path / "one").glob("*.safetensors"), *(tmp_path / "several").glob("*.safetensors*")]
    assert len(written) > 3
    assert {file.stat().st_mode & 0o777 for file in written} == {mode}


def test_tensors_are_copied_before_the_stream_moves_on(tmp_path, source):
    def one_buffer():
        for name, tensor in weights().items():
            buffer[: tensor.numel()].copy_(tensor.flatten())
            yield name, buffer[: tensor.numel()].view(tensor.shape)

    buffer = torch.empty(max(tensor.numel() for tensor in weights().values()), dtype=torch.bfloat16)
    save_hf(one_buffer(), CONFIG, source, tmp_path / "out")
    saved = HFFolder(tmp_path / "out")
    assert all(torch.equal(saved.tensor(name), tensor) for name, tensor in weights().items())


def test_an_older_export_of_the_same_name_is_replaced(tmp_path, source):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old.safetensors").write_text("old")
    save_hf(weights().items(), CONFIG, source, tmp_path / "out")
    assert "old.safetensors" not in content(tmp_path / "out")
    assert content(tmp_path) == {"source", "out"}


def without_one(stream):
    return stream[:-1]


def with_one_twice(stream):
    return [*stream, stream[0]]


def with_an_unknown_one(stream):
    return [*stream, ("model.extra", torch.zeros(1))]


@pytest.mark.parametrize(
    ("mutation", "complaint"),
    [(without_one, r"missing \(1\): model.norm.weight"), (with_one_twice, "embed_tokens.weight: written twice"),
     (with_an_unknown_one, r"unexpected \(1\): model.extra")],
)  # fmt: skip
def test_an_incomplete_export_never_appears_and_leaves_the_older_one_alone(tmp_path, source, mutation, complaint):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/older").write_text("kept")
    with pytest.raises(ValueError, match=complaint):
        save_hf(mutation(list(weights().items())), CONFIG, source, tmp_path / "out")
    assert content(tmp_path / "out") == {"older"}
    assert content(tmp_path) == {"source", "out"}


def test_a_source_without_config_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no config\.json"):
        save_hf(weights().items(), CONFIG, tmp_path / "empty", tmp_path / "out")
