"""Converted checkpoints hold what mbridge, an independent implementation, makes of the same weights.

They are read by torch's own loader. tests/oracle/make_mbridge.py says where the digests come from.
"""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dapo_mcore.weights.conversion import Sizes, hf_to_mcore
from dapo_mcore.weights.names import hf_shapes
from tests.oracle.mbridge_inputs import EXPERTS, FAMILIES, SIZES, digest, hf_tensor, megatron_names

STORED = json.loads((Path(__file__).parents[2] / "data" / "oracle" / "mbridge.json").read_text())["digests"]


def read(folder):
    """Key -> whole tensor, by torch."""
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.items()
    tensors = {
        key: torch.full(entry.size, torch.nan) for key, entry in entries if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return tensors


def named(tensors):
    """By the names of a model with Transformer Engine's layers."""
    names = {}
    for key, tensor in tensors.items():
        if ".experts.experts." in key:
            stem = key.replace(".experts.experts.", ".experts.")
            names |= {f"{stem}{expert}": tensor[expert] for expert in range(EXPERTS)}
        elif re.match(r"decoder\.layers\.[a-z]", key):
            names |= {key.replace("layers.", f"layers.{layer}."): part for layer, part in enumerate(tensor)}
        else:
            names[key] = tensor
    return names


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(tp=2, pp=2, etp=2)], ids=["one_rank", "tp2_pp2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_checkpoint_is_the_one_mbridge_makes(tmp_path, family, sizes):
    kind, options = FAMILIES[family]
    config = getattr(transformers, kind)(**{**SIZES, **options})
    config.save_pretrained(tmp_path / "hf")
    save_file({name: hf_tensor(family, name) for name in hf_shapes(config)}, tmp_path / "hf" / "model.safetensors")
    hf_to_mcore(tmp_path / "hf", tmp_path / "mcore", sizes, None, 1, lambda total: lambda count: None)
    found = named(read(tmp_path / "mcore"))
    assert {name: digest(found[name]) for name in megatron_names(family)} == STORED[family]
