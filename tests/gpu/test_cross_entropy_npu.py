"""The loss over torch_npu's fused cross entropy on an Ascend device, against float64 on the host."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from dapo_kernels import PolicyLossSpec, fused_linear_policy_loss

from dapo_mcore.platform import platform
from tools.bench.loss import error, exact_gradients
from tools.bench.loss_contenders import Shape, clipped_loss, make_problem, ours

pytestmark = [
    pytest.mark.npu,
    pytest.mark.skipif(find_spec("torch_npu") is None, reason="needs an Ascend device"),
]
SIZES = [(300, 512, 32_003), (257, 384, 17)]  # T, H, V


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_equal_float64_on_the_exact_inputs(size, dtype):
    problem = make_problem(Shape(*size, dtype, platform().device))
    exact = exact_gradients(problem, torch.device("cpu"))
    ours(problem, backend="npu")
    found = [problem.hidden.grad, problem.weight.grad]
    bound = 1e-4 if dtype is torch.float32 else torch.finfo(dtype).eps
    assert all(error(a, b) < bound for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("size", SIZES)
def test_log_probabilities_and_loss_equal_float64(size):
    problem = make_problem(Shape(*size, torch.float32, platform().device))
    out = fused_linear_policy_loss(
        problem.hidden, problem.weight, problem.targets, problem.advantages, problem.loss_mask, PolicyLossSpec(),
        problem.old_logprobs, scale=problem.scale, backend="npu",
    )  # fmt: skip
    logits = problem.hidden.detach().cpu().double() @ problem.weight.detach().cpu().double().T
    exact = torch.log_softmax(logits, -1).gather(1, problem.targets.cpu()[:, None])[:, 0]
    assert (out.logprobs.cpu() - exact).abs().max() < 1e-4
    here = replace(problem, advantages=problem.advantages.cpu(), old_logprobs=problem.old_logprobs.cpu())
    assert float(out.loss) == pytest.approx(float(clipped_loss(exact, here)), rel=1e-4, abs=1e-5)
