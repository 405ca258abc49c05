"""Policy loss with the output layer: time over the matrix products' floor, peak extra memory, gradient error.

    python -m tools.bench loss                      CPU: T=2,048 H=256 V=32,000 fp32
    python -m tools.bench loss --device cuda        T=16,384 H=2,048 V=151,936 bf16; so on an npu

All times come from one run in which the contenders take turns. What could not be measured is listed with the reason.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from dapo_mcore.platform import PLATFORMS, platform
from launch.sites import find_platform
from tools.bench import loss_contenders as contenders
from tools.bench.loss_contenders import Problem, Shape
from tools.bench.loss_memory import MEASURED, peak_of
from tools.figures import Figure, as_json

SIZES = {"cpu": (2048, 256, 32_000)}
ACCELERATOR_SIZES = (16_384, 2048, 151_936)
EXACT_ROWS = 512  # tokens whose float64 logits are alive at once
HOST_TOKENS = 1024  # of which the exact gradient is computed where the device multiplies no float64: on the host
WITHOUT_FLOAT64 = ("npu",)


@dataclass
class Row:
    name: str
    run: Callable[[Problem], None]
    floor_products: int  # matrix products between tokens and vocabulary that cannot be avoided
    is_exact: bool = False  # computes the same gradient as the float64 reference
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)  # of all threads: says more than the clock on a busy host
    peak_bytes: int | None = None
    errors: tuple[float, float] | None = None  # of hidden's and weight's gradient

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def make_shape(name: str, sizes: tuple[int, int, int] | None) -> Shape:
    """`sizes`: tokens, hidden size, vocabulary; None: those of the platform's bars."""
    dtype = torch.float32 if name == "cpu" else torch.bfloat16
    return Shape(*(sizes or SIZES.get(name, ACCELERATOR_SIZES)), dtype, platform().device)


def rows_for(name: str, shape: Shape) -> tuple[list[Row], list[str]]:
    rows = [
        Row("three matrix products", contenders.matrix_products, 3),
        Row("eager", contenders.eager, 3, is_exact=True),
        Row("ours", contenders.ours, 3, is_exact=True),
        Row("ours, 25% prompt 25% clipped", contenders.ours_half_inactive, 3),
        Row("ours, entropy bonus and k3", contenders.ours_with_entropy_and_kl, 3),
        Row("ours, log-probabilities only", contenders.ours_logprobs, 1),
    ]
    backends, missing = contenders.other_backends(shape)
    rows += [Row(told, run, 3, is_exact=True) for told, run in backends.items()]
    if name != "cuda":
        return rows, [*missing, *(f"{peer}: needs a CUDA device" for peer in contenders.PEERS)]
    rows.append(Row("torch.compile + checkpoint", contenders.compiled_with_checkpoint(), 3, is_exact=True))
    peers, absent = contenders.installed_peers()
    rows += [Row(peer, run, 3, is_exact=True) for peer, run in peers.items()]
    return rows, [*missing, *(f"{peer}: not installed" for peer in absent)]


def measure_times(rows: list[Row], problem: Problem, repeats: int) -> None:
    for turn in range(repeats + 1):
        for row in rows:
            start = time.process_time()
            seconds = timed(partial(row.run, problem), problem)
            if turn:  # the first turn warms up
                row.seconds.append(seconds)
                row.cpu_seconds.append(time.process_time() - start)


def timed(run: Callable[[], Any], problem: Problem) -> float:
    problem.hidden.grad = problem.weight.grad = None
    platform().synchronize()
    start = time.perf_counter()
    run()
    platform().synchronize()
    return time.perf_counter() - start


def measure_memory(rows: list[Row], problem: Problem) -> None:
    functions = {function: name for name, function in MEASURED.items()}
    for row in rows:
        if platform().name != "cpu":
            row.peak_bytes = device_peak(row, problem)
        elif row.run in functions:
            row.peak_bytes = peak_of(functions[row.run], problem.shape)


def device_peak(row: Row, problem: Problem) -> int:
    accelerator = getattr(torch, platform().name)
    problem.hidden.grad = problem.weight.grad = None
    accelerator.reset_peak_memory_stats()
    before = accelerator.memory_allocated()
    row.run(problem)
    gradients = sum(x.grad.nbytes for x in (problem.hidden, problem.weight) if x.grad is not None)
    return accelerator.max_memory_allocated() - before - gradients


def measure_errors(rows: list[Row], problem: Problem) -> None:
    """Relative to gradients by autograd in float64 on the exact values of the inputs."""
    device = problem.shape.device
    if platform().name in WITHOUT_FLOAT64:
        problem, device = first_tokens(problem, HOST_TOKENS), torch.device("cpu")
    exact = exact_gradients(problem, device)
    for row in rows:
        if row.is_exact:
            timed(partial(row.run, problem), problem)
            row.errors = (error(problem.hidden.grad, exact[0]), error(problem.weight.grad, exact[1]))


def first_tokens(problem: Problem, count: int) -> Problem:
    per_token = ("targets", "advantages", "loss_mask", "old_logprobs")
    return replace(
        problem,
        shape=replace(problem.shape, tokens=min(count, problem.shape.tokens)),
        hidden=problem.hidden.detach()[:count].clone().requires_grad_(),
        **{name: getattr(problem, name)[:count] for name in per_token},
    )


def exact_gradients(problem: Problem, device: torch.device) -> tuple[Any, Any]:
    """Of hidden and weight, in float64 on `device`."""
    weight = problem.weight.detach().to(device).double().requires_grad_()
    hidden = problem.hidden.detach().to(device).double().requires_grad_()
    for first in range(0, problem.shape.tokens, EXACT_ROWS):
        span = slice(first, first + EXACT_ROWS)
        targets, advantages, mask, old = (
            values[span].to(device)
            for values in (problem.targets, problem.advantages, problem.loss_mask, problem.old_logprobs)
        )
        logprobs = torch.log_softmax(hidden[span] @ weight.T, -1).gather(1, targets[:, None])[:, 0]
        part = Problem(problem.shape, hidden, weight, targets, advantages, mask, old)
        contenders.clipped_loss(logprobs, part).backward()
    return hidden.grad, weight.grad


def error(actual: Any, exact: Any) -> float:
    return float((actual.to(exact.device).double() - exact).norm() / exact.norm())


def measure_from_logits(problem: Problem, repeats: int) -> Figure:
    """From logits, in place: over one read and one write at the copy bandwidth of the same run."""
    shape = problem.shape
    logits = torch.empty(shape.tokens, shape.vocabulary, dtype=shape.dtype, device=shape.device)
    other = torch.empty_like(logits)
    copies = [timed(partial(other.copy_, logits), problem) for _ in range(repeats + 1)]
    del logits, other
    losses = [timed(contenders.from_logits(problem), problem) for _ in range(repeats + 1)]
    floor, ours = statistics.median(copies[1:]), statistics.median(losses[1:])
    return Figure("from logits, in place, over a copy", ours / floor, bar=1.5 if platform().name == "cuda" else None)


def show(rows: list[Row], problem: Problem) -> None:
    shape = problem.shape
    product = rows[0].median / 3
    print(f"T={shape.tokens:,} H={shape.hidden_size:,} V={shape.vocabulary:,} {shape.dtype} on {machine()}")
    print(f"matrix products: {shape.gemm_flops / product / 1e12:.3f} TFLOP/s\n")
    print(
        f"{'':34}{'ms':>10}{'best ms':>10}{'CPU ms':>10}{'x floor':>9}{'extra MiB':>11}{'dX error':>11}{'dW error':>11}"
    )
    for row in rows:
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}"
        errors = ("-", "-") if row.errors is None else tuple(f"{value:.2e}" for value in row.errors)
        times = f"{row.median * 1e3:>10.1f}{min(row.seconds) * 1e3:>10.1f}{min(row.cpu_seconds) * 1e3:>10.1f}"
        ratio = over_floor(row, rows)
        print(f"{row.name:34}{times}{ratio:>10.2f}{peak:>10}{errors[0]:>10}{errors[1]:>10}")


def machine() -> str:
    name = platform().name
    return f"CPU, {torch.get_num_threads()} threads" if name == "cpu" else getattr(torch, name).get_device_name()


def over_floor(row: Row, rows: list[Row]) -> float:
    return row.median / (row.floor_products * rows[0].median / 3)


def bars(rows: list[Row], name: str) -> list[Figure]:
    """Each that this run can judge."""
    by_name = {row.name: row for row in rows}
    eager, ours = by_name["eager"], by_name["ours"]
    half = by_name["ours, 25% prompt 25% clipped"]
    found = [Figure("half of the rows without gradient over all rows", half.median / ours.median, bar=0.70)]
    if name == "cpu":
        found.append(Figure("best time over eager's", min(ours.seconds) / min(eager.seconds), bar=1.0))
        found.append(Figure("least CPU time over eager's", min(ours.cpu_seconds) / min(eager.cpu_seconds), bar=1.0))
        if ours.peak_bytes is not None and eager.peak_bytes:
            found.append(Figure("extra memory over eager's", ours.peak_bytes / eager.peak_bytes, bar=1 / 8))
    if name == "cuda":
        bonus, only = by_name["ours, entropy bonus and k3"], by_name["ours, log-probabilities only"]
        found += [
            Figure("all rows over the floor", over_floor(ours, rows), bar=1.06),
            Figure("with entropy bonus and k3 over the floor", over_floor(bonus, rows), bar=1.10),
            Figure("log-probabilities over a third of the floor", over_floor(only, rows), bar=1.10),
            Figure("extra memory", (ours.peak_bytes or 0) / 2**30, "GiB", 1.5),
        ]
    if ours.errors and eager.errors:
        worst = max(mine / plain for mine, plain in zip(ours.errors, eager.errors, strict=True))
        found.append(Figure("gradient error over eager's", worst, bar=1.2))
    return found


def figures(rows: list[Row]) -> list[Figure]:
    """What each contender takes, without a bar; memory and error of those that compute the same."""
    found: list[Figure] = []
    for row in rows:
        found.append(Figure(row.name, row.median * 1e3, "ms"))
        if row.is_exact and row.peak_bytes is not None:
            found.append(Figure(f"{row.name}: extra memory", row.peak_bytes / 2**20, "MiB"))
        if row.errors is not None:
            found.append(Figure(f"{row.name}: gradient error", max(row.errors)))
    return found


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench loss", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=list(PLATFORMS), default=find_platform())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of torch, for the contenders on a CPU")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("T", "H", "V"), help="another one than the bars are for")
    parser.add_argument("--json", action="store_true", help="end with the figures as a line of JSON")
    options = parser.parse_args(arguments)
    name = os.environ["DAPO_PLATFORM"] = options.device
    if name == "cpu":
        torch.set_num_threads(options.threads)
    problem = contenders.make_problem(make_shape(name, options.shape))
    rows, missing = rows_for(name, problem.shape)
    measure_times(rows, problem, options.repeats)
    measure_memory(rows, problem)
    measure_errors(rows, problem)
    show(rows, problem)
    judged = bars(rows, name)
    if name == "cpu":
        missing.append("the bars for a Hopper-class GPU, and from logits in place: no accelerator was used")
    else:
        judged.append(measure_from_logits(problem, options.repeats))
    print("\n" + "\n".join(told(figure) for figure in judged))
    print("\nnot measured:\n" + "\n".join(f"  {line}" for line in missing))
    if options.json:
        print(as_json([*judged, *figures(rows)], missing=missing))


def told(figure: Figure) -> str:
    verdict = "" if figure.bar is None else "holds" if figure.holds else "MISSED"
    return f"{verdict:>7}  {figure.name}: {figure} {f'(bar {figure.bar_told})' if figure.bar is not None else ''}"
