import math

import pytest
import torch
from dapo_kernels import PolicyLossSpec, fused_linear_policy_loss
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.kernels.cases import SPECS_WITHOUT_KL, Case, cases, examples
from tests.unit.kernels.compare import check_from_logits, check_linear


@given(cases(double=st.just(True)), st.sampled_from(["torch", "reference"]))
@examples(40)
def test_loss_and_gradients_equal_the_definition_in_float64(case, backend):
    check_linear(case, backend, tolerance=1e-12)


@given(cases(), st.sampled_from(["torch", "reference"]))
@examples(25)
def test_float32_stays_within_its_rounding(case, backend):
    check_linear(case, backend, tolerance=2e-6)


@given(cases(double=st.just(True)), st.sampled_from(["torch", "reference"]), st.booleans())
@examples(25)
def test_from_logits_equals_the_definition_in_float64_in_place_or_not(case, backend, inplace):
    check_from_logits(case, backend, tolerance=1e-12, inplace=inplace)


EXTREME = {"magnitude": st.sampled_from([1e2, 1e4]), "excluded": st.integers(0, 7)}


@given(cases(st.integers(8, 300), double=st.just(True), **EXTREME), st.sampled_from(["torch", "reference"]))
@examples(25)
def test_extreme_logits_and_excluded_columns_are_exact_in_float64(case, backend):
    check_from_logits(case, backend, tolerance=1e-11, inplace=False)


@given(cases(st.integers(8, 300), on_policy=st.just(True), spec=SPECS_WITHOUT_KL, **EXTREME), st.booleans())
@examples(25)
def test_extreme_logits_and_excluded_columns_lose_nothing_in_float32(case, inplace):
    check_from_logits(case, "torch", tolerance=2e-6, inplace=inplace)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_on_the_exact_values_of_its_inputs(dtype, backend):
    case = Case(tokens=9, hidden_size=64, vocabulary=5000, seed=1, spec=PolicyLossSpec(entropy_coeff=0.01), scale=1.0)
    made = case.tensors()
    hidden = (made["hidden"] * 3).to(dtype).requires_grad_()
    weight = (made["weight"] * 3).to(dtype).requires_grad_()
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    inputs = case.inputs(exact_hidden @ exact_weight.T)
    truth = case.truth(exact_hidden @ exact_weight.T, inputs)
    truth.loss.backward()
    out = fused_linear_policy_loss(hidden, weight, spec=case.spec, backend=backend, chunk_rows=4, **inputs)
    out.loss.backward()
    assert (out.logprobs.double() - truth.logprobs).abs().max() < 1e-4
    rounding = torch.finfo(dtype).eps
    for ours, exact in ((hidden, exact_hidden), (weight, exact_weight)):
        assert ours.grad.dtype == dtype
        assert (ours.grad.double() - exact.grad).norm() / exact.grad.norm() < rounding


CLIPS = [  # advantage, ratio, loss, derivative by the log-probability; clip 0.2 / 0.28, c = 10
    (2.0, 1.00, -2.00, -2.00),
    (2.0, 1.27, -2.54, -2.54),
    (2.0, 1.50, -2.56, 0.0),  # clip-higher: the upper bound is 1.28
    (2.0, 0.10, -0.20, -0.20),  # a positive advantage is never clipped from below
    (-2.0, 1.00, 2.00, 2.00),
    (-2.0, 0.81, 1.62, 1.62),
    (-2.0, 0.50, 1.60, 0.0),  # lower bound 0.8
    (-2.0, 5.00, 10.0, 10.0),  # a negative advantage is not clipped at 1.28 ...
    (-2.0, 50.0, 20.0, 0.0),  # ... but at c
    (0.0, 3.0, 0.0, 0.0),
]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("advantage", "ratio", "loss", "derivative"), CLIPS)
def test_clip_bounds_are_asymmetric_and_dual(advantage, ratio, loss, derivative, backend):
    # two tokens of equal logits: the log-probability is log(1/2), and d logprob / d logits = (1/2, -1/2)
    hidden = torch.zeros(1, 1, dtype=torch.float64) + 1
    weight = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    old = torch.tensor([math.log(0.5) - math.log(ratio)], dtype=torch.float64)
    out = fused_linear_policy_loss(
        hidden, weight, torch.tensor([0]), torch.tensor([advantage]), torch.tensor([True]), PolicyLossSpec(),
        old_logprobs=old, backend=backend,
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.item() == pytest.approx(loss, rel=1e-12)
    assert weight.grad[:, 0].tolist() == pytest.approx([derivative / 2, -derivative / 2], rel=1e-12)
    counted = {name: out.stats[name].item() for name in ("clip_high", "clip_low", "clip_dual")}
    assert counted == {
        "clip_high": float(advantage > 0 and ratio > 1.28),
        "clip_low": float(advantage < 0 and ratio < 0.8),
        "clip_dual": float(advantage < 0 and ratio > 10),
    }


def test_an_infinite_ratio_is_clipped_without_a_trace_of_nan():
    logits = torch.tensor([[0.0, -1e4], [1e4, 0.0]], dtype=torch.float32)
    weight = torch.eye(2, requires_grad=True)
    hidden = logits.clone().requires_grad_()
    out = fused_linear_policy_loss(
        hidden, weight, torch.tensor([0, 0]), torch.tensor([1.0, -1.0]), torch.tensor([True, True]), PolicyLossSpec(),
        old_logprobs=torch.tensor([-1e4, -1e4]), backend="torch",
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.item() == pytest.approx(-1.28 + 10.0)
    assert torch.equal(hidden.grad, torch.zeros(2, 2))
    assert all(value.isfinite() for value in out.stats.values())


def test_without_old_logprobs_the_ratio_is_one_and_the_gradient_that_of_the_log_probability():
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    targets, advantages, mask = torch.randint(0, 7, (5,)), torch.randn(5), torch.ones(5, dtype=torch.bool)
    on_policy = fused_linear_policy_loss(hidden, weight, targets, advantages, mask, PolicyLossSpec(), backend="torch")
    on_policy.loss.backward()
    expected = torch.autograd.grad(
        -(advantages * torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])[:, 0]).sum(), hidden
    )[0]
    torch.testing.assert_close(hidden.grad, expected)
    assert on_policy.loss.item() == pytest.approx(-advantages.sum().item(), rel=1e-5)
    assert on_policy.stats["ratio"].item() == on_policy.stats["num_tokens"].item() == 5
    assert on_policy.stats["ratio_max"].item() == 1


def test_micro_batches_add_up_to_the_batch():
    torch.manual_seed(0)
    hidden, weight = torch.randn(12, 4, dtype=torch.float64), torch.randn(30, 4, dtype=torch.float64)
    targets, advantages, mask = torch.randint(0, 30, (12,)), torch.randn(12), torch.rand(12) > 0.3
    old, spec = torch.randn(12) - 3, PolicyLossSpec(entropy_coeff=0.1)

    def gradient(parts):
        leaf = weight.clone().requires_grad_()
        outs = [
            fused_linear_policy_loss(
                hidden[p], leaf, targets[p], advantages[p], mask[p], spec, old_logprobs=old[p], scale=1 / mask.sum()
            )
            for p in parts
        ]
        sum(out.loss for out in outs).backward()
        return leaf.grad, {name: sum(out.stats[name] for out in outs) for name in outs[0].stats if name != "ratio_max"}

    whole, stats = gradient([slice(0, 12)])
    split, summed = gradient([slice(0, 1), slice(1, 8), slice(8, 12)])
    torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-14)
    for name, value in stats.items():
        torch.testing.assert_close(summed[name], value)
