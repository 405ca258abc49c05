"""The Triton backend as compiled code, at sizes of real vocabularies, against float64 on the same device."""

from __future__ import annotations

import pytest
import torch
from dapo_kernels import KLEstimator, PolicyLossSpec, fused_linear_policy_loss, fused_policy_loss_from_logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SPECS = [
    PolicyLossSpec(),
    PolicyLossSpec(entropy_coeff=0.01, kl_coeff=0.1, kl_estimator=KLEstimator.K3, temperature=0.8),
    PolicyLossSpec(kl_coeff=0.1, kl_estimator=KLEstimator.LOW_VAR, clip_ratio_c=3.0),
]
SIZES = [(300, 512, 151_936), (257, 384, 32_003), (40, 64, 17)]  # T, H, V


def arguments(tokens, hidden_size, vocabulary, dtype):
    torch.manual_seed(tokens)
    hidden = torch.randn(tokens, hidden_size, device="cuda").to(dtype)
    weight = (torch.randn(vocabulary, hidden_size, device="cuda") * 2 * hidden_size**-0.5).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,), device="cuda")
    logprobs = torch.log_softmax(hidden.double() @ weight.double().T, -1).gather(1, targets[:, None])[:, 0]
    # log-ratios away from the bounds' logarithms, so that rounding moves no token across
    shift = torch.tensor([0.0, 0.1, -0.4, 1.5, -3.0], device="cuda")[torch.arange(tokens, device="cuda") % 5]
    rest = {
        "targets": targets,
        "advantages": torch.randn(tokens, device="cuda"),
        "loss_mask": torch.rand(tokens, device="cuda") < 0.8,
        "old_logprobs": (logprobs - shift).float(),
        "ref_logprobs": (logprobs + 0.3 * shift).float(),
        "scale": 1 / tokens,
    }
    return hidden, weight, rest


def gradients(function, leaves, **arguments):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*leaves, **arguments)
    out.loss.backward()
    return out, [leaf.grad for leaf in leaves]


def error(actual, exact):
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("spec", SPECS)
def test_half_precision_equals_float64_on_the_exact_inputs(size, spec):
    hidden, weight, rest = arguments(*size, torch.bfloat16)
    exact, exact_gradients = gradients(
        fused_linear_policy_loss, (hidden.double(), weight.double()), spec=spec, backend="reference", **rest
    )
    out, ours = gradients(fused_linear_policy_loss, (hidden, weight), spec=spec, chunk_rows=128, **rest)
    assert (out.logprobs - exact.logprobs).abs().max() < 1e-4
    assert (out.entropy - exact.entropy).abs().max() < 1e-3
    assert float(out.loss) == pytest.approx(float(exact.loss), rel=1e-4, abs=1e-5)
    eager_like = torch.finfo(torch.bfloat16).eps
    assert all(error(a, b) < eager_like for a, b in zip(ours, exact_gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_in_place_logits_become_their_gradient(size, dtype):
    hidden, weight, rest = arguments(*size, dtype)
    logits = (hidden.float() @ weight.float().T).to(dtype)
    spec = PolicyLossSpec(entropy_coeff=0.01)
    exact, (exact_gradient,) = gradients(
        fused_policy_loss_from_logits, (logits.double(),), spec=spec, backend="reference", **rest
    )
    leaf = logits.clone().requires_grad_()
    out = fused_policy_loss_from_logits(leaf * 1.0, spec=spec, inplace=True, **rest)
    out.loss.backward()
    assert (out.logprobs - exact.logprobs).abs().max() < 1e-4
    assert error(leaf.grad, exact_gradient) < (1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps)


def test_auto_is_the_triton_backend_and_agrees_with_the_torch_one():
    hidden, weight, rest = arguments(300, 256, 32_000, torch.float32)
    auto, by_auto = gradients(fused_linear_policy_loss, (hidden, weight), spec=SPECS[1], **rest)
    plain, by_torch = gradients(fused_linear_policy_loss, (hidden, weight), spec=SPECS[1], backend="torch", **rest)
    torch.testing.assert_close(auto.logprobs, plain.logprobs, rtol=1e-5, atol=1e-5)
    assert all(error(a, b) < 1e-4 for a, b in zip(by_auto, by_torch, strict=True))


def test_peak_extra_memory_is_one_chunk():
    hidden, weight, rest = arguments(1024, 256, 151_936, torch.bfloat16)
    hidden.requires_grad_()
    weight.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused_linear_policy_loss(hidden, weight, spec=SPECS[0], chunk_rows=128, **rest).loss.backward()
    gradients = weight.numel() * (4 + 2) + hidden.numel() * 2  # the weight's in float32, then in its own type
    chunk = 128 * 151_936 * 4
    assert torch.cuda.max_memory_allocated() - before - gradients < 1.5 * chunk
