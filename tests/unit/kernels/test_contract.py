"""What a caller such as the actor's loss head relies on, besides the values."""

import ast
import math
import sys
from pathlib import Path

import dapo_kernels
import pytest
import torch
from dapo_kernels import (
    PolicyLossSpec,
    fused_linear_policy_loss,
    fused_policy_loss_from_logits,
    linear_logprobs,
)
from dapo_kernels.chunks import fill_holes
from torch.utils._python_dispatch import TorchDispatchMode

SPEC = PolicyLossSpec()
PACKAGE = Path(dapo_kernels.__file__).parent
BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch"])


def arguments(tokens=6, hidden_size=4, vocabulary=11, **changes):
    torch.manual_seed(0)
    given = {
        "hidden": torch.randn(tokens, hidden_size, requires_grad=True),
        "weight": torch.randn(vocabulary, hidden_size, requires_grad=True),
        "targets": torch.randint(0, vocabulary, (tokens,)),
        "advantages": torch.randn(tokens),
        "loss_mask": torch.ones(tokens, dtype=torch.bool),
        "spec": SPEC,
    }
    return given | changes


@BACKENDS
@pytest.mark.parametrize(("tokens", "masked"), [(0, False), (5, True)])
def test_a_batch_without_loss_tokens_stays_connected_with_a_zero_gradient(tokens, masked, backend):
    given = arguments(tokens, loss_mask=torch.full((tokens,), not masked), backend=backend)
    out = fused_linear_policy_loss(**given)
    assert out.loss.requires_grad
    assert out.loss.item() == 0
    assert out.stats["num_tokens"].item() == out.stats["ratio_max"].item() == 0
    out.loss.backward()
    assert torch.equal(given["hidden"].grad, torch.zeros(tokens, 4))
    assert torch.equal(given["weight"].grad, torch.zeros(11, 4))


@BACKENDS
def test_only_inputs_that_want_a_gradient_get_one(backend):
    frozen_weight = arguments(backend=backend, weight=torch.randn(11, 4))
    fused_linear_policy_loss(**frozen_weight).loss.backward()
    assert frozen_weight["hidden"].grad is not None
    detached = arguments(backend=backend, hidden=torch.randn(6, 4))
    fused_linear_policy_loss(**detached).loss.backward()
    assert detached["weight"].grad is not None
    with torch.no_grad():
        assert not fused_linear_policy_loss(**arguments(backend=backend)).loss.requires_grad


def test_a_second_backward_is_refused_instead_of_scaling_twice():
    out = fused_linear_policy_loss(**arguments(backend="torch"))
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_in_place_logits_that_another_backward_needs_are_refused():
    leaf = torch.randn(6, 11, requires_grad=True)
    logits = leaf * 2
    also = logits.square().sum()
    given = {name: x for name, x in arguments().items() if name not in ("hidden", "weight")}
    out = fused_policy_loss_from_logits(logits, **given, inplace=True, backend="torch")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (also + out.loss).backward()


def test_the_weight_gradient_is_added_to_main_grad_in_float32():
    plain = arguments(hidden=torch.randn(6, 4, dtype=torch.bfloat16), weight=torch.randn(11, 4).bfloat16())
    plain["weight"].requires_grad_()
    exact = {"hidden": plain["hidden"].float(), "weight": plain["weight"].detach().float().requires_grad_()}
    (fused_linear_policy_loss(**plain | exact).loss * 3).backward()

    weight = plain["weight"]
    weight.main_grad = torch.full((11, 4), 0.5)
    weight.grad_added_to_main_grad = False
    fired = []
    weight.register_post_accumulate_grad_hook(lambda parameter: fired.append(parameter.grad.clone()))
    (fused_linear_policy_loss(**plain, accumulate_into_main_grad=True).loss * 3).backward()
    torch.testing.assert_close(weight.main_grad, exact["weight"].grad + 0.5, rtol=1e-6, atol=1e-6)
    assert weight.grad_added_to_main_grad
    assert torch.equal(fired[0], torch.zeros(11, 4, dtype=torch.bfloat16))  # Megatron's hook must fire, and add nothing


def test_scale_may_be_a_tensor_and_only_scales():
    once, tenth = (arguments(scale=scale) for scale in (1.0, torch.tensor(0.1)))
    first, second = fused_linear_policy_loss(**once), fused_linear_policy_loss(**tenth)
    first.loss.backward()
    second.loss.backward()
    torch.testing.assert_close(second.loss, first.loss * 0.1)
    torch.testing.assert_close(tenth["weight"].grad, once["weight"].grad * 0.1)
    assert torch.equal(first.stats["ratio"], second.stats["ratio"])


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("spec", [SPEC, PolicyLossSpec(entropy_coeff=0.1, temperature=0.5)])
def test_nothing_as_large_as_a_quarter_of_the_logits_is_ever_made(spec):
    given = arguments(256, 8, 1000, spec=spec, chunk_rows=32, backend="torch")
    with LargestTensor() as largest:
        fused_linear_policy_loss(**given).loss.backward()
        linear_logprobs(given["hidden"], given["weight"], given["targets"], chunk_rows=32, backend="torch")
    assert 32 * 1000 <= largest.elements < 256 * 1000 / 4


class GemmRows(TorchDispatchMode):
    """Token rows that went through matrix products with the vocabulary, before and after the loss is known."""

    def __init__(self):
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.out:
            self.forward += args[0].shape[0]
        if func is torch.ops.aten.addmm_.default:
            self.backward += args[2].shape[0]
        return func(*args, **(kwargs or {}))


def test_masked_rows_meet_no_gemm_and_rows_without_gradient_only_the_first():
    mask = torch.arange(16) % 4 != 0  # 12 of 16
    given = arguments(16, loss_mask=mask, advantages=torch.ones(16), chunk_rows=5, backend="torch")
    exact = linear_logprobs(given["hidden"], given["weight"], given["targets"]).logprobs
    clipped = torch.arange(16) % 4 == 1  # 4 of the 12
    given["old_logprobs"] = torch.where(clipped, exact - 1, exact)
    given["advantages"][2] = 0.0
    with GemmRows() as rows:
        out = fused_linear_policy_loss(**given)
    assert out.stats["clip_high"].item() == 4
    assert rows.forward == 12
    assert rows.backward == 12 - 4 - 1


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.7, 1.0])
def test_holes_are_filled_from_behind_so_that_no_row_read_is_overwritten(rate):
    torch.manual_seed(3)
    for length in (1, 2, 7, 40):
        active = torch.rand(length) < rate
        count = int(active.sum())
        sources = fill_holes(active, count)
        assert sorted(sources.tolist()) == active.nonzero()[:, 0].tolist()
        assert all(source in (row, *range(count, length)) for row, source in enumerate(sources.tolist()))


BAD_INPUT = [
    ({"hidden": torch.randn(6, 4, 1)}, r"hidden: shape \[6, 4, 1\], expected \[T, H\]"),
    ({"hidden": torch.ones(6, 4, dtype=torch.int64)}, "hidden: dtype torch.int64, expected bfloat16"),
    ({"weight": torch.randn(11, 5)}, r"weight: shape \[11, 5\], expected \[V/tp, 4\]"),
    ({"weight": torch.randn(11, 4).bfloat16()}, "weight: dtype torch.bfloat16, expected torch.float32 like hidden"),
    ({"targets": torch.zeros(5, dtype=torch.int64)}, r"targets: shape \[5\], expected \[6\]"),
    ({"targets": torch.zeros(6, dtype=torch.int32)}, "targets: dtype torch.int32 .* expected torch.int64"),
    ({"targets": torch.tensor([0, 1, 2, 3, 4, 11])}, "targets: 1 unmasked ids"),
    ({"targets": torch.tensor([0, 1, 2, -1, 4, -100])}, "targets: 2 unmasked ids"),
    ({"advantages": torch.zeros(6, 1)}, r"advantages: shape \[6, 1\], expected \[6\]"),
    ({"advantages": torch.zeros(6).half()}, "advantages: dtype torch.float16 .* expected torch.float32"),
    ({"loss_mask": torch.ones(6)}, "loss_mask: dtype torch.float32 .* expected torch.bool"),
    ({"old_logprobs": torch.zeros(7)}, r"old_logprobs: shape \[7\], expected \[6\]"),
    ({"ref_logprobs": torch.zeros(6).double()}, "ref_logprobs: dtype torch.float64"),
    ({"token_weights": torch.zeros(6, device="meta")}, "token_weights: on meta .* expected cpu"),
    ({"spec": PolicyLossSpec(kl_coeff=0.1)}, "ref_logprobs: None, expected .* because kl_coeff=0.1"),
    ({"scale": math.inf}, "scale: inf, expected a finite number"),
    ({"scale": torch.tensor(math.nan)}, "scale: a 0-d tensor that is not finite"),
    ({"scale": torch.ones(2)}, r"scale: shape \[2\], expected a number or a 0-d tensor"),
    ({"vocab_start": -1}, "vocab_start: -1"),
    ({"vocab_size": 0}, "vocab_size: 0"),
    ({"vocab_size": 5, "targets": torch.full((6,), 5)}, "targets: 6 unmasked ids"),
    ({"backend": "cublas"}, "backend: 'cublas', expected one of auto, reference, torch, triton, npu"),
    ({"backend": "triton"}, "backend: 'triton' does not run on cpu"),
    ({"backend": "npu"}, "backend: 'npu' needs the operator npu_cross_entropy_loss of torch_npu"),
    ({"accumulate_into_main_grad": True}, "weight: .* without main_grad"),
    ({"chunk_rows": 0}, "chunk_rows: 0, expected"),
]


@pytest.mark.parametrize(("change", "message"), BAD_INPUT, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_refused_with_the_argument_its_shape_and_the_expectation(change, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=message):
        fused_linear_policy_loss(**arguments(**change))


def test_masked_targets_may_be_anything():
    given = arguments(loss_mask=torch.arange(6) < 4, targets=torch.tensor([0, 1, 2, 3, -100, 1 << 40]))
    assert fused_linear_policy_loss(**given).logprobs[4:].tolist() == [0.0, 0.0]


def test_log_probabilities_refuse_a_target_outside_the_vocabulary():
    given = arguments()
    with pytest.raises(ValueError, match="targets: 1 unmasked ids"):
        linear_logprobs(given["hidden"], given["weight"], torch.tensor([0, 1, 2, 3, 4, 11]))


@pytest.mark.parametrize(
    "option",
    [{"clip_low": 1.0}, {"clip_high": -0.1}, {"clip_ratio_c": 1.0}, {"temperature": 0.0}, {"kl_coeff": math.nan}],
)
def test_impossible_options_are_refused_by_name(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"PolicyLossSpec.{name}={option[name]}"):
        PolicyLossSpec(**option)


def test_the_package_imports_torch_alone_and_triton_only_where_its_kernels_are():
    for path in PACKAGE.glob("*.py"):
        imports = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        modules = [x for node in imports for x in ([node.module] if isinstance(node, ast.ImportFrom) else names(node))]
        foreign = (
            {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) - {"dapo_kernels", "torch"}
        )
        assert foreign <= ({"triton"} if path.name == "triton_kernels.py" else set()), path.name


def names(node):
    return [alias.name for alias in node.names]
