"""A policy that sees, against transformers; and that each known mistake would show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file
from torch import Tensor

from dapo_mcore.actor.build import build_chunks, read_hf_config, transformer_config
from dapo_mcore.actor.packing import Cut, MicroBatch, pack
from dapo_mcore.actor.vision.deepstack import DeepstackLayer
from dapo_mcore.config import Dtype, MegatronConfig
from dapo_mcore.weights import hf_weights, load_hf
from dapo_mcore.weights.conversion import Sizes, hf_to_mcore
from tests.tiny_vl import KINDS, save_published, tiny_vl
from tests.vision_packs import all_logits, mixed_batch, reference_logits

CPU = torch.device("cpu")
BATCH = mixed_batch()
EVERYTHING = range(len(BATCH))


@pytest.fixture(scope="module", params=KINDS)
def policy(request, tmp_path_factory) -> tuple[Any, list[Tensor]]:
    """The model under Megatron, and what transformers says about the batch."""
    model = tiny_vl(request.param)
    folder = save_published(model, tmp_path_factory.mktemp(request.param))
    hf = read_hf_config(folder)
    (chunk,) = build_chunks(hf, transformer_config(hf, MegatronConfig(), Dtype.fp32))
    load_hf([chunk], folder, hf)
    with torch.no_grad():
        return chunk, reference_logits(model, BATCH)


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory) -> Path:
    return save_published(tiny_vl(request.param), tmp_path_factory.mktemp("published"))


def built(folder, dtype=Dtype.fp32) -> Any:
    """Its chunk, every parameter NaN."""
    hf = read_hf_config(folder)
    (chunk,) = build_chunks(hf, transformer_config(hf, MegatronConfig(), dtype))
    for parameter in chunk.parameters():
        parameter.data.fill_(torch.nan)
    return hf, chunk


def test_every_parameter_is_filled_and_the_export_equals_the_files_bit_for_bit(folder):
    hf, chunk = built(folder)
    load_hf([chunk], folder, hf)
    files, exported = load_file(folder / "model.safetensors"), dict(hf_weights([chunk], hf))
    assert exported.keys() == files.keys()
    assert [name for name, tensor in files.items() if not torch.equal(tensor, exported[name])] == []


def test_megatron_loads_a_converted_checkpoint_tower_included(folder, tmp_path):
    hf_to_mcore(folder, tmp_path / "mcore", Sizes(tp=2), None, 1, lambda total: lambda count: None)
    hf, chunk = built(folder)
    loaded = dist_checkpointing.load({"model": chunk.sharded_state_dict()}, str(tmp_path / "mcore"))
    chunk.load_state_dict(loaded["model"])
    exported = dict(hf_weights([chunk], hf))
    assert all(torch.equal(t, exported[name]) for name, t in load_file(folder / "model.safetensors").items())


def test_in_bf16_the_frequencies_of_the_tower_and_of_the_decoder_stay_in_fp32(folder):
    hf, chunk = built(folder, Dtype.bf16)
    load_hf([chunk], folder, hf)
    assert {parameter.dtype for parameter in chunk.visual.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in chunk.visual.buffers()} == {torch.float32}
    with torch.no_grad():
        positions = packed(EVERYTHING).vision.positions[:, None]
        assert chunk.rotary_pos_emb(positions).dtype == torch.float32
        assert chunk(packed(EVERYTHING), all_logits).isfinite().all()


def test_a_first_stage_without_all_layers_that_get_features_is_refused(tmp_path):
    model = tiny_vl("qwen3_vl")
    model.config.text_config.num_hidden_layers = 1
    model.config.save_pretrained(tmp_path)
    hf = read_hf_config(tmp_path)
    with pytest.raises(ValueError, match=r"pipeline_model_parallel_size=1: .* has 1 layers, .* first 2; use fewer"):
        build_chunks(hf, transformer_config(hf, MegatronConfig(), Dtype.fp32))


def packed(sequences) -> MicroBatch:
    """Every token of the sequences is asked for."""
    micro_batch = pack(BATCH, sequences, BATCH.loss_mask, Cut(), CPU)
    return replace(micro_batch, rows=torch.arange(micro_batch.input_ids.shape[1]))


def distance(policy, micro_batch=None, sequences=EVERYTHING) -> float:
    chunk, reference = policy
    with torch.no_grad():
        logits = chunk(micro_batch or packed(sequences), all_logits)
    return float((logits - torch.cat([reference[i] for i in sequences])).abs().max())


@pytest.mark.parametrize("sequences", [EVERYTHING, [4, 2, 0], [0], [2]])
def test_logits_of_a_pack_equal_those_of_transformers_sequence_by_sequence(policy, sequences):
    assert distance(policy, sequences=sequences) <= 5e-6


def with_positions(positions) -> MicroBatch:
    micro_batch = packed(EVERYTHING)
    return replace(micro_batch, vision=replace(micro_batch.vision, positions=positions(micro_batch)))


def counted_up(micro_batch):
    return micro_batch.vision.positions.new_tensor(
        [[i for length in micro_batch.packed.cu_seqlens_q.diff().tolist() for i in range(length)]] * 3
    )


def from_the_first_row(micro_batch):
    """Every sequence takes the first rows of the pack."""
    lengths = micro_batch.packed.cu_seqlens_q.diff().tolist()
    return torch.cat([micro_batch.vision.positions[:, :length] for length in lengths], 1)


@pytest.mark.parametrize("positions", [counted_up, from_the_first_row])
def test_wrong_positions_show(policy, positions):
    assert distance(policy, with_positions(positions)) > 0.05


def test_sections_in_one_piece_would_show(policy, monkeypatch):
    chunked = torch.tensor([0] * 6 + [1] * 5 + [2] * 5)
    monkeypatch.setattr(policy[0].rotary_pos_emb, "axis", chunked)
    assert distance(policy) > 0.05


def test_a_decoder_without_deepstack_would_show(policy, monkeypatch):
    plain = DeepstackLayer.__mro__[1].forward
    monkeypatch.setattr(DeepstackLayer, "forward", lambda *args, context=None, **kwargs: plain(*args, **kwargs))
    assert distance(policy) > 0.05


def test_features_added_before_the_layer_would_show(policy, monkeypatch):
    plain: Any = DeepstackLayer.__mro__[1].forward

    def before(layer, hidden_states, context=None, **kwargs):
        if context is not None and layer.layer_number <= context.shape[2]:
            hidden_states = hidden_states + context[:, :, layer.layer_number - 1]
        return plain(layer, hidden_states, **kwargs)[0], context

    monkeypatch.setattr(DeepstackLayer, "forward", before)
    assert distance(policy) > 0.05


def test_without_an_image_none_of_these_would():
    """Text has equal positions in all three dimensions and no features: parity needs images to mean anything."""
    micro_batch = packed([0])
    assert torch.equal(micro_batch.vision.positions, counted_up(micro_batch))


def test_there_is_one_decoder_and_the_tower_is_frozen(policy):
    chunk, _ = policy
    names = dict(chunk.named_parameters())
    assert sum(name.endswith("linear_qkv.weight") for name in names) == 4
    assert {name.split(".")[0] for name, p in names.items() if not p.requires_grad} == {"visual"}
    assert all(p.requires_grad is False for name, p in names.items() if name.startswith("visual."))
