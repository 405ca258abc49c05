from multiprocessing import set_forkserver_preload
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from tests.unit.kernels import ranks
from tests.unit.kernels.float64 import relative_error


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """[rank] -> what it computed."""
    folder = tmp_path_factory.mktemp("ranks")
    # one process imports torch, the ranks are copies of it: a fourth of the time of four imports
    set_forkserver_preload(["torch", "hypothesis"])
    mp.start_processes(ranks.main, (str(folder),), ranks.WORLD, start_method="forkserver")
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks.WORLD)]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ranks.CASES)
def test_a_split_vocabulary_changes_nothing(results, name, size, backend):
    case, *_, vocab_size = ranks.CASES[name]
    tolerance = 1e-10 if case.double else 2e-5
    made = case.tensors()
    hidden, weight = (made["hidden"] * case.magnitude).requires_grad_(), made["weight"].clone().requires_grad_()
    exact = ranks.logits_of(case, vocab_size)
    inputs = case.inputs(exact)
    logits = hidden @ weight.T
    logits.retain_grad()
    truth = case.truth(logits if vocab_size is None else logits[:, :vocab_size], inputs)
    truth.loss.backward()

    parts = [results[rank][name, size, backend] for rank in range(size)]
    for part in parts:
        assert float(part["loss"]) == pytest.approx(float(truth.loss.detach()), rel=tolerance, abs=tolerance)
        assert float(part["direct"]) == pytest.approx(float(truth.loss.detach()), rel=tolerance, abs=tolerance)
        for key, expected in (("logprobs", truth.logprobs), ("entropy", truth.entropy)):
            torch.testing.assert_close(part[key].double(), expected, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(getattr(part["only"], key).double(), expected, rtol=tolerance, atol=tolerance)
    assert relative_error(sum(part["hidden"].double() for part in parts), hidden.grad) < tolerance
    assert relative_error(torch.cat([part["weight"] for part in parts]), weight.grad) < tolerance
    assert relative_error(torch.cat([part["logits"] for part in parts], dim=1), logits.grad) < tolerance


def test_every_rank_has_the_same_loss_and_statistics_to_the_bit(results):
    for name in ranks.CASES:
        first, *others = (results[rank][name, 4, "torch"] for rank in range(4))
        for other in others:
            assert torch.equal(first["loss"], other["loss"])
            assert torch.equal(first["logprobs"], other["logprobs"])
            assert {k: v.item() for k, v in first["stats"].items()} == {k: v.item() for k, v in other["stats"].items()}


def test_at_most_six_floats_per_row_are_exchanged(results):
    for rank in range(ranks.WORLD):
        sent, rows = results[rank]["sent"]
        assert 0 < sent <= 6 * rows


def test_a_target_outside_every_shard_is_refused_on_every_rank(results):
    for rank in range(ranks.WORLD):
        assert "targets: 1 unmasked ids" in results[rank]["refusal"]
