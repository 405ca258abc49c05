"""Checkpoints of the converter under Megatron's own loader, and Megatron's own under the converter."""

from __future__ import annotations

import pytest
import torch

from dapo_mcore.weights.conversion import Sizes, differences, hf_to_mcore, mcore_to_hf, open_source, read_config
from tests.distributed.conversion_ranks import loaded, trained
from tests.distributed.weights_ranks import LENGTHS, run_all
from tools.certificate.reference import VOCAB, tiny_model
from tools.certificate.spawn import spawn

# (model, sizes it is laid out for, layout of the loader)
CASES = {
    1: [
        ("llama", Sizes(tp=2), {}),
        ("llama_tied_scaled_rope", Sizes(pp=2), {}),
        ("qwen2", Sizes(tp=4), {}),
        ("qwen2_tied", Sizes(), {}),
        ("qwen3", Sizes(tp=2, pp=2), {}),
        ("qwen3_tied", Sizes(tp=4), {}),
        ("qwen3_moe", Sizes(tp=2, ep=4, etp=2), {}),
        ("qwen3_moe_unnormed", Sizes(), {}),
    ],
    2: [
        ("llama", Sizes(), {"tp": 2, "etp": 2}),
        ("qwen3_tied", Sizes(tp=2), {"pp": 2}),
        ("qwen3_moe_mixed", Sizes(pp=2, etp=2), {"tp": 2, "ep": 2, "etp": 1}),
    ],
}
TRAINED = {"qwen2": {}, "qwen3_moe": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}}
IDS = [f"{model}-{world}" for world, cases in CASES.items() for model, _, _ in cases]


def quiet(total):
    return lambda count: None


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name of the model -> (folder saved by transformers, logits [tokens, vocabulary]); and the sequences"""
    draw = torch.Generator().manual_seed(5)
    sequences = [torch.randint(VOCAB, (length,), generator=draw) for length in LENGTHS]
    root, out = tmp_path_factory.mktemp("models"), {}
    for name in {model for cases in CASES.values() for model, _, _ in cases}:
        model = tiny_model(name)
        model.save_pretrained(root / name)
        with torch.no_grad():
            out[name] = root / name, torch.cat([model(ids[None]).logits[0] for ids in sequences])
    return out, sequences


@pytest.fixture(scope="module")
def reports(folders, tmp_path_factory):
    """id -> what each rank saw; and the folder of the training runs."""
    (truth, sequences), root, out = folders, tmp_path_factory.mktemp("mcore"), {}
    for world, cases in CASES.items():
        tasks = []
        for model, sizes, layout in cases:
            folder, checkpoint = truth[model][0], root / f"{model}-{world}"
            hf_to_mcore(folder, checkpoint, sizes, None, 1, quiet)
            tasks.append((loaded, (folder, checkpoint, sequences, layout)))
        name, layout = list(TRAINED.items())[world - 1]
        tasks.append((trained, (truth[name][0], root / "trained" / name, layout)))
        ranks = spawn(run_all, world, tasks)
        out |= {f"{case[0]}-{world}": [rank[n] for rank in ranks] for n, case in enumerate(cases)}
    return out, root / "trained"


@pytest.mark.parametrize("case", IDS)
def test_megatron_loads_a_converted_checkpoint_under_another_layout(reports, case):
    assert [rank["differing"] for rank in reports[0][case]] == [[]] * int(case[-1])


@pytest.mark.parametrize("case", [case for case in IDS if case != "qwen3_tied-2"])  # whose logits are on one stage
def test_logits_after_conversion_equal_those_of_transformers(reports, folders, case):
    expected = folders[0][case.rpartition("-")[0]][1]
    for rank in reports[0][case]:
        assert (rank["logits"] - expected).abs().max() <= 5e-6


@pytest.mark.parametrize("name", TRAINED)
def test_a_checkpoint_of_a_training_run_becomes_a_hugging_face_folder(reports, folders, tmp_path, name):
    source, config = folders[0][name][0], read_config(folders[0][name][0])
    mcore_to_hf(reports[1] / name / "step_000001", tmp_path / "hf", source, 1, quiet)
    pair = (open_source(folder, config) for folder in (source, tmp_path / "hf"))
    assert list(differences(*pair, config, quiet)) == []
