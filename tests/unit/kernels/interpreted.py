"""Checks of the Triton kernels for a process that had Triton's interpreter switched on from its start."""

from __future__ import annotations

import math

import torch
from dapo_kernels import torch_rows, triton_rows
from dapo_kernels.policy import TokenInputs, token_loss_derivative
from dapo_kernels.shard import RowStatistics
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.kernels.cases import SPECS, SPECS_WITHOUT_KL, cases, examples
from tests.unit.kernels.compare import check_from_logits, check_linear

# Around the block size, so that a row takes one block, exactly one, and several.
VOCABULARIES = st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 4095, 4096, 4097, 8200]))
EXTREME = {"magnitude": st.sampled_from([1e2, 1e4]), "excluded": st.integers(0, 7)}


@given(cases(VOCABULARIES))
@examples(25)
def linear(case):
    check_linear(case, "triton", tolerance=2e-6)


@given(cases(VOCABULARIES), st.booleans())
@examples(20)
def from_logits(case, inplace):
    check_from_logits(case, "triton", tolerance=2e-6, inplace=inplace)


@given(cases(st.integers(8, 5000), on_policy=st.just(True), spec=SPECS_WITHOUT_KL, **EXTREME), st.booleans())
@examples(20)
def extreme_logits(case, inplace):
    check_from_logits(case, "triton", tolerance=2e-6, inplace=inplace)


@given(SPECS, st.integers(0, 1000), st.integers(1, 300), st.booleans(), st.booleans())
@examples(25)
def token_terms(spec, seed, rows, on_policy, weighted):
    """The kernel's derivative equals the formula's in torch, which autograd checks elsewhere."""
    g = torch.Generator().manual_seed(seed)

    def spread_out():
        return torch.randn(rows, generator=g) * 3

    logprobs = -torch.rand(rows, generator=g) * 5 - 1
    tokens = TokenInputs(
        spread_out(), None if on_policy else logprobs + spread_out(), logprobs + spread_out() * 2,
        torch.rand(rows, generator=g) if weighted else None,
    )  # fmt: skip
    sum_exp = torch.exp(-logprobs)
    ones = torch.ones(rows)
    merged = RowStatistics(ones * 3, sum_exp, -ones, torch.zeros(rows), ones)
    ours_logprobs, entropy, derivative = triton_rows.token_terms(merged, tokens, spec)
    torch.testing.assert_close(ours_logprobs, merged.logprobs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy, merged.entropy, rtol=1e-6, atol=1e-6)
    expected = token_loss_derivative(merged.logprobs, tokens, spec)
    torch.testing.assert_close(derivative, expected, rtol=1e-4, atol=1e-5)


def narrow_output_in_the_memory_of_the_logits() -> None:
    """bfloat16 rows begin where the float32 rows begin, and inactive rows are filled from behind."""
    torch.manual_seed(0)
    logits = torch.randn(5, 64)[:, :51]
    wide = torch.zeros(5, 64)[:, :51].copy_(logits)
    columns, derivative = torch.tensor([3, -1, 50, 0, 7]), torch.tensor([1.0, 2.0, 0.0, -0.5, 3.0])
    sources = torch.tensor([0, 1, 4, 3])
    statistics = triton_rows.statistics(wide, columns, 1.3)
    bonus = torch.tensor([0.2, 0.0, 0.5, 0.1, 0.3])
    rest = (derivative, bonus, 1.3, sources)
    dlogits = triton_rows.gradient(wide, columns, statistics, statistics, *rest, torch.bfloat16)
    assert dlogits.data_ptr() == wide.data_ptr()
    plain = torch_rows.statistics(logits, columns, 1.3)
    expected = torch_rows.gradient(logits, columns, plain, plain, *rest, torch.float32)
    torch.testing.assert_close(dlogits.float(), expected, rtol=1e-2, atol=1e-6)


def rows_beyond_the_grid() -> None:
    """More rows than programs: each program walks over several."""
    most = triton_rows.MAX_PROGRAMS
    triton_rows.MAX_PROGRAMS = 3
    try:
        logits, columns = torch.randn(10, 9), torch.arange(10) % 9
        ours = triton_rows.statistics(logits, columns, 1.0)
    finally:
        triton_rows.MAX_PROGRAMS = most
    plain = torch_rows.statistics(logits, columns, 1.0)
    for name in ("peak", "sum_exp", "weighted", "target", "held"):
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name))


def a_factor_of_one_leaves_the_values_alone() -> None:
    values = torch.tensor([math.nan, 2.0, 3.0], dtype=torch.bfloat16)
    triton_rows.scale_in_place(values, torch.tensor(1.0))
    assert values[1:].tolist() == [2.0, 3.0]
    triton_rows.scale_in_place(values, torch.tensor(0.5))
    assert values[1:].tolist() == [1.0, 1.5]


def a_row_that_holds_nan_is_not_taken_for_a_number() -> None:
    logits = torch.tensor([[0.0, math.nan, 1.0], [0.0, 1.0, 2.0]])
    statistics = triton_rows.statistics(logits, torch.tensor([0, 0]), 1.0)
    assert statistics.sum_exp.isnan().tolist() == [True, False]
