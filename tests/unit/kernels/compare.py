"""Runs one case through a backend and holds everything it returns against float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from dapo_kernels import PolicyLoss, fused_linear_policy_loss, fused_policy_loss_from_logits, linear_logprobs
from torch import Tensor

from tests.unit.kernels.cases import Case
from tests.unit.kernels.float64 import Truth, relative_error

MAGNIFIED = 20.0  # exp(30) magnifies the rounding of a log-ratio of 30


def check_linear(case: Case, backend: str, tolerance: float) -> None:
    """Loss, log-probabilities, entropy, statistics and both gradients, with NaN wherever the mask is False."""
    made, mask = case.tensors(), case.tensors()["loss_mask"]
    hidden, weight = made["hidden"].clone().requires_grad_(), made["weight"].clone().requires_grad_()
    logits = hidden @ weight.T
    inputs = case.inputs(logits)
    truth = case.truth(logits, inputs)
    (truth.loss * 1.7).backward()

    poisoned = torch.where(mask[:, None], made["hidden"], math.nan)
    ours, ours_weight = leaf(poisoned, case.double), leaf(made["weight"], case.double)
    out = fused_linear_policy_loss(
        ours, ours_weight, spec=case.spec, backend=backend, chunk_rows=case.chunk_rows, **as_dtype(inputs, case.double)
    )
    assert out.loss.requires_grad
    (out.loss * 1.7).backward()
    check_values(out, truth, tolerance, case)
    close_rows(ours.grad, hidden.grad, tolerance, case)
    assert relative_error(ours_weight.grad, weight.grad) <= tolerance * MAGNIFIED

    only = linear_logprobs(
        leaf(poisoned, case.double), ours_weight, inputs["targets"], temperature=case.spec.temperature,
        loss_mask=mask, backend=backend, chunk_rows=case.chunk_rows,
    )  # fmt: skip
    torch.testing.assert_close(only.logprobs.double(), truth.logprobs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(only.entropy.double(), truth.entropy, rtol=tolerance, atol=tolerance)


def check_from_logits(case: Case, backend: str, tolerance: float, *, inplace: bool) -> None:
    made, mask = case.tensors(), case.tensors()["loss_mask"]
    exact = made["logits"].clone().requires_grad_()
    inputs = case.inputs(exact)
    truth = case.truth(exact, inputs)
    (truth.loss * 1.7).backward() if truth.loss.requires_grad else None

    poisoned = torch.where(mask[:, None], made["logits"], math.nan)
    ours = leaf(poisoned, case.double)
    logits = ours * 1.0  # not a leaf, as in a model
    out = fused_policy_loss_from_logits(
        logits, spec=case.spec, backend=backend, chunk_rows=case.chunk_rows, inplace=inplace,
        **as_dtype(inputs, case.double),
    )  # fmt: skip
    (out.loss * 1.7).backward()
    check_values(out, truth, tolerance, case)
    expected = torch.zeros_like(exact) if exact.grad is None else exact.grad
    close_rows(ours.grad, expected, tolerance, case)


def check_values(out: PolicyLoss, truth: Truth, tolerance: float, case: Case) -> None:
    loose = tolerance * MAGNIFIED
    torch.testing.assert_close(out.loss.detach().double(), truth.loss.detach(), rtol=loose, atol=loose)
    assert not out.logprobs.requires_grad
    torch.testing.assert_close(out.logprobs.double(), truth.logprobs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out.entropy.double(), truth.entropy, rtol=tolerance, atol=tolerance * 10)
    for name, expected in truth.counts.items():
        if name != "kl" or case.spec.kl_coeff:
            assert math.isclose(float(out.stats[name]), expected, rel_tol=loose, abs_tol=loose), name


def close_rows(actual: Tensor | None, expected: Tensor | None, tolerance: float, case: Case) -> None:
    """Each row within the tolerance of its own norm; a row that is exactly 0 must be so."""
    assert actual is not None
    assert expected is not None
    for row, (ours, truth) in enumerate(zip(actual.double(), expected, strict=True)):
        error, norm = float((ours - truth).norm()), float(truth.norm())
        if norm == 0:
            assert error == 0, f"row {row} carries no gradient"
        assert error <= tolerance * MAGNIFIED * (norm + 0.01 * case.scale), f"row {row}: {error} of {norm}"


def leaf(tensor: Tensor, double: bool) -> Tensor:
    return tensor.detach().to(torch.float64 if double else torch.float32).clone().requires_grad_()


def as_dtype(inputs: dict[str, Any], double: bool) -> dict[str, Any]:
    """The float tensors as the case's type wants them."""
    floats = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return inputs | {name: x.to(torch.float64 if double else torch.float32) for name, x in floats.items()}
