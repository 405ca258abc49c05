"""What one rank of a tensor-parallel group computes; run in processes of its own by test_tensor_parallel."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from dapo_kernels import (
    KLEstimator,
    PolicyLossSpec,
    fused_linear_policy_loss,
    fused_policy_loss_from_logits,
    linear_logprobs,
)
from torch import Tensor

from tests.unit.kernels.cases import Case

WORLD = 4
EVERYTHING = PolicyLossSpec(entropy_coeff=0.05, kl_coeff=0.1, kl_estimator=KLEstimator.K3, temperature=0.7)
BOUNDS = ((0, 16, 32, 48, 64), (0, 32, 64))
# Case; where the shards of 4 and of 2 ranks begin and the last one ends; real vocabulary, behind which is padding.
CASES = {
    "equal shards": (Case(9, 8, 64, 1, EVERYTHING, double=True), *BOUNDS, None),
    "shards that differ": (Case(11, 7, 61, 2, PolicyLossSpec(), double=True), (0, 1, 30, 37, 61), (0, 50, 61), None),
    "a shard of padding": (Case(9, 8, 64, 3, EVERYTHING, double=True), *BOUNDS, 31),
    "all masked": (Case(5, 8, 64, 4, EVERYTHING, double=True, mask_rate=0.0), *BOUNDS, None),
    "extreme": (Case(9, 8, 64, 5, PolicyLossSpec(), magnitude=1e4, double=True), *BOUNDS, None),
    "float32": (Case(9, 8, 64, 6, EVERYTHING), *BOUNDS, None),
}


def logits_of(case: Case, vocab_size: int | None) -> Tensor:
    """[T, V] float64 with the padding at -inf; targets are real entries."""
    made = case.tensors()
    logits = made["hidden"] @ made["weight"].T * case.magnitude
    if vocab_size is not None:
        logits = torch.cat([logits[:, :vocab_size], torch.full_like(logits[:, vocab_size:], -math.inf)], dim=1)
        made["targets"] %= vocab_size
    return logits


def main(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {4: (dist.group.WORLD, rank), 2: (pairs[rank // 2], rank % 2)}
    results: dict[Any, Any] = {}
    for name, (case, starts_of_4, starts_of_2, vocab_size) in CASES.items():
        for size, starts in ((4, starts_of_4), (2, starts_of_2)):
            group, place = groups[size]
            for backend in ("torch", "reference"):
                results[name, size, backend] = run(case, group, starts[place : place + 2], vocab_size, backend)
    results["sent"] = floats_sent(*CASES["equal shards"][:2], rank)
    results["refusal"] = refusal(rank)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def run(case: Case, group: Any, bounds: tuple[int, int], vocab_size: int | None, backend: str) -> dict[str, Any]:
    made, shard = case.tensors(), slice(*bounds)
    dtype = torch.float64 if case.double else torch.float32
    inputs = case.inputs(logits_of(case, vocab_size))
    mask = made["loss_mask"][:, None]
    hidden = torch.where(mask, made["hidden"] * case.magnitude, math.nan).to(dtype).requires_grad_()
    weight = made["weight"][shard].to(dtype).clone().requires_grad_()
    common: dict[str, Any] = {
        "tp_group": group, "vocab_start": bounds[0], "vocab_size": vocab_size, "backend": backend, "chunk_rows": 2,
    }  # fmt: skip
    out = fused_linear_policy_loss(hidden, weight, spec=case.spec, **inputs, **common)
    out.loss.backward()
    logits = (made["hidden"] @ made["weight"][shard].T * case.magnitude).to(dtype).requires_grad_()
    direct = fused_policy_loss_from_logits(logits, spec=case.spec, **inputs, **common)
    direct.loss.backward()
    only = linear_logprobs(
        hidden, weight, inputs["targets"], temperature=case.spec.temperature, loss_mask=inputs["loss_mask"], **common
    )
    return {
        "loss": out.loss.detach(), "logprobs": out.logprobs, "entropy": out.entropy, "stats": out.stats,
        "hidden": hidden.grad, "weight": weight.grad, "logits": logits.grad, "direct": direct.loss.detach(),
        "only": only,
    }  # fmt: skip


def floats_sent(case: Case, starts: tuple[int, ...], rank: int) -> tuple[int, int]:
    """Numbers handed to collectives by one loss, and unmasked rows."""
    counted, all_reduce = [], dist.all_reduce

    def counting(values: Tensor, *args: Any, **kwargs: Any) -> Any:
        counted.append(values.numel())
        return all_reduce(values, *args, **kwargs)

    dist.all_reduce = counting
    run_once = case.tensors()
    fused_linear_policy_loss(
        run_once["hidden"], run_once["weight"][starts[rank] : starts[rank + 1]].requires_grad_(), spec=case.spec,
        tp_group=dist.group.WORLD, vocab_start=starts[rank], **case.inputs(logits_of(case, None)),
    )  # fmt: skip
    dist.all_reduce = all_reduce
    return sum(counted), int(run_once["loss_mask"].sum())


def refusal(rank: int) -> str:
    """The message about a target that no shard holds."""
    hidden, weight = torch.ones(3, 2), torch.ones(4, 2, requires_grad=True)
    try:
        fused_linear_policy_loss(
            hidden, weight, torch.tensor([0, 15, 16]), torch.ones(3), torch.ones(3, dtype=torch.bool),
            PolicyLossSpec(), tp_group=dist.group.WORLD, vocab_start=4 * rank,
        )  # fmt: skip
    except ValueError as error:
        return str(error)
    return ""
