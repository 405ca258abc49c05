"""The policy loss in every way the bench compares: ours, eager, compiled, and the peers that are installed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from dapo_kernels import (
    PolicyLossSpec,
    fused_linear_policy_loss,
    fused_policy_loss_from_logits,
    linear_logprobs,
    registry,
)
from torch import Tensor

SEQUENCE = 1024  # tokens that share an advantage, as peers want it per sequence


@dataclass(frozen=True)
class Shape:
    tokens: int
    hidden_size: int
    vocabulary: int
    dtype: torch.dtype
    device: torch.device

    @property
    def gemm_flops(self) -> int:
        """Of one matrix product between tokens and vocabulary."""
        return 2 * self.tokens * self.hidden_size * self.vocabulary


@dataclass(frozen=True)
class Problem:
    """Every row active: ratios lie within the clip."""

    shape: Shape
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    advantages: Tensor
    loss_mask: Tensor
    old_logprobs: Tensor

    @property
    def scale(self) -> float:
        return 1 / self.shape.tokens


def make_problem(shape: Shape) -> Problem:
    g = torch.Generator(shape.device).manual_seed(0)
    floats: dict[str, Any] = {"generator": g, "device": shape.device}
    hidden = torch.randn(shape.tokens, shape.hidden_size, **floats).to(shape.dtype).requires_grad_()
    weight = torch.randn(shape.vocabulary, shape.hidden_size, **floats) * 2 * shape.hidden_size**-0.5
    weight = weight.to(shape.dtype).requires_grad_()
    targets = torch.randint(0, shape.vocabulary, (shape.tokens,), **floats)
    sequences = math.ceil(shape.tokens / SEQUENCE)
    advantages = torch.randn(sequences, **floats).repeat_interleave(SEQUENCE)[: shape.tokens]
    exact = linear_logprobs(hidden, weight, targets, backend="torch").logprobs
    old = exact + 0.05 * torch.randn(shape.tokens, **floats).clamp(-2, 2)
    mask = torch.ones(shape.tokens, dtype=torch.bool, device=shape.device)
    return Problem(shape, hidden, weight, targets, advantages, mask, old)


def clipped_loss(logprobs: Tensor, problem: Problem) -> Tensor:
    ratio, advantages = (logprobs - problem.old_logprobs).exp(), problem.advantages
    surrogate = torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.28))
    dual = torch.where(advantages < 0, torch.min(surrogate, -advantages * 10.0), surrogate)
    return dual.sum() * problem.scale


def eager(problem: Problem) -> None:
    logits = (problem.hidden @ problem.weight.T).float()
    logprobs = torch.log_softmax(logits, -1).gather(1, problem.targets[:, None])[:, 0]
    clipped_loss(logprobs, problem).backward()


def ours(
    problem: Problem,
    spec: PolicyLossSpec | None = None,
    ref_logprobs: Tensor | None = None,
    backend: str = registry.AUTO,
) -> None:
    fused_linear_policy_loss(
        problem.hidden, problem.weight, problem.targets, problem.advantages, problem.loss_mask,
        spec or PolicyLossSpec(), problem.old_logprobs, ref_logprobs, scale=problem.scale, backend=backend,
    ).loss.backward()  # fmt: skip


def ours_half_inactive(problem: Problem) -> None:
    """A quarter of the rows is prompt, another quarter clipped."""
    row = torch.arange(problem.shape.tokens, device=problem.shape.device)
    shift = torch.where(problem.advantages > 0, -1.0, 1.0) * (row % 4 == 1)
    ours(replace(problem, loss_mask=row % 4 != 0, old_logprobs=problem.old_logprobs + shift))


def ours_with_entropy_and_kl(problem: Problem) -> None:
    ours(problem, PolicyLossSpec(entropy_coeff=0.01, kl_coeff=0.1), ref_logprobs=problem.old_logprobs)


def ours_logprobs(problem: Problem) -> None:
    linear_logprobs(problem.hidden, problem.weight, problem.targets)


def matrix_products(problem: Problem) -> None:
    """The floor: the three products alone, in the same chunks' shapes, with nothing kept."""
    rows = min(2048, problem.shape.tokens)
    with torch.no_grad():
        for first in range(0, problem.shape.tokens, rows):
            hidden = problem.hidden[first : first + rows]
            logits = torch.mm(hidden, problem.weight.T)
            torch.mm(logits.T, hidden)
            torch.mm(logits, problem.weight)


def compiled_with_checkpoint() -> Callable[[Problem], None]:
    from torch.utils.checkpoint import checkpoint

    @torch.compile
    def logprobs_of(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, targets[:, None])[:, 0]

    def run(problem: Problem) -> None:
        pieces = zip(problem.hidden.split(2048), problem.targets.split(2048), strict=True)
        parts = [checkpoint(logprobs_of, h, problem.weight, t, use_reentrant=False) for h, t in pieces]
        clipped_loss(torch.cat(parts), problem).backward()

    return run


def liger() -> Callable[[Problem], None]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # pyright: ignore[reportMissingImports]

    loss = LigerFusedLinearGRPOLoss(beta=0.0, epsilon_low=0.2, epsilon_high=0.28, use_ref_model=False, loss_type="dapo")

    def run(problem: Problem) -> None:
        batch = problem.shape.tokens // SEQUENCE
        value, _ = loss(
            problem.hidden.view(batch, SEQUENCE, -1), problem.weight, problem.targets.view(batch, SEQUENCE),
            problem.loss_mask.view(batch, SEQUENCE), problem.advantages[::SEQUENCE],
            old_per_token_logps=problem.old_logprobs.view(batch, SEQUENCE),
        )  # fmt: skip
        value.backward()

    return run


def cut_cross_entropy() -> Callable[[Problem], None]:
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    def run(problem: Problem) -> None:
        negative = linear_cross_entropy(problem.hidden, problem.weight, problem.targets, reduction="none")
        clipped_loss(-negative, problem).backward()

    return run


def verl() -> Callable[[Problem], None]:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    def run(problem: Problem) -> None:
        logprobs, _ = linear_cross_entropy(problem.hidden, problem.weight, problem.targets, 1.0, "none", None)
        clipped_loss(logprobs, problem).backward()

    return run


def from_logits(problem: Problem) -> Callable[[], None]:
    """Logits are made anew for each repetition, outside the measurement: in place means they are gone afterwards."""
    leaf = (problem.hidden @ problem.weight.T).detach().requires_grad_()

    def run() -> None:
        fused_policy_loss_from_logits(
            leaf, problem.targets, problem.advantages, problem.loss_mask, PolicyLossSpec(),
            old_logprobs=problem.old_logprobs, scale=problem.scale, inplace=True,
        ).loss.backward()  # fmt: skip

    return run


def other_backends(shape: Shape) -> tuple[dict[str, Callable[[Problem], None]], list[str]]:
    """Ours by every backend that can run and is not the one chosen by itself, and why the others cannot."""
    chosen = registry.select(registry.AUTO, shape.device, shape.dtype)
    present: dict[str, Callable[[Problem], None]] = {}
    missing: list[str] = []
    for backend in registry.ROW_KERNELS:
        try:
            registry.select(backend, shape.device, shape.dtype)
        except ValueError as reason:
            missing.append(str(reason))
        else:
            if backend != chosen:
                present[f"ours, backend {backend}"] = partial(ours, backend=backend)
    return present, missing


PEERS: dict[str, tuple[str, Callable[[], Callable[[Problem], None]]]] = {
    "Liger fused linear GRPO": ("liger_kernel", liger),
    "cut-cross-entropy": ("cut_cross_entropy", cut_cross_entropy),
    "verl linear_cross_entropy": ("verl", verl),
}


def installed_peers() -> tuple[dict[str, Callable[[Problem], None]], list[str]]:
    """Those that can be imported, and the names of the others."""
    present = {name: make() for name, (module, make) in PEERS.items() if find_spec(module) is not None}
    return present, [name for name in PEERS if name not in present]
