"""Checks of the loss over npu_cross_entropy_loss, for a process with the fakes on its path."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dapo_kernels import registry, torch_rows
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.kernels.cases import cases, examples
from tests.unit.kernels.compare import check_from_logits, check_linear

NPU: Any = SimpleNamespace(type="npu")  # torch knows no such device here


@given(cases())
@examples(15)
def loss_and_gradients(case):
    check_linear(case, registry.NPU, tolerance=2e-6)


@given(cases(excluded=st.integers(0, 5), vocabulary=st.integers(8, 60)), st.booleans())
@examples(15)
def from_logits_with_excluded_columns(case, inplace):
    check_from_logits(case, registry.NPU, tolerance=2e-6, inplace=inplace)


def parts_of_a_row_merge_as_those_of_torch():
    """Both describe the same rows, about different peaks."""
    logits = torch.randn(7, 40, generator=torch.Generator().manual_seed(0)) * 5
    columns = torch.tensor([-1, 0, 39, -1, 5, 6, 7])  # -1: on another rank
    ours, theirs = logits.clone(), logits.clone()
    a = registry.row_kernels(registry.NPU).statistics(ours, columns, 0.7)
    b = torch_rows.statistics(theirs, columns, 0.7)
    shift = a.peak - b.peak
    torch.testing.assert_close(a.sum_exp * shift.exp(), b.sum_exp)
    torch.testing.assert_close(shift.exp() * (a.weighted + shift * a.sum_exp), b.weighted)
    torch.testing.assert_close(torch.where(a.held > 0, a.target + shift, 0.0), b.target)
    torch.testing.assert_close(ours * shift.exp()[:, None], theirs)
    assert torch.equal(a.held, b.held)


def chosen_by_name_only():
    """`auto` stays with plain torch; float64 is not what the operator computes."""
    assert registry.select("auto", NPU, torch.bfloat16) == registry.TORCH
    assert registry.select("npu", NPU, torch.bfloat16) == registry.NPU
    with pytest.raises(ValueError, match="use 'torch'"):
        registry.select("npu", NPU, torch.float64)


CHECKS = (
    loss_and_gradients,
    from_logits_with_excluded_columns,
    parts_of_a_row_merge_as_those_of_torch,
    chosen_by_name_only,
)
