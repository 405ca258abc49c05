"""Policy loss with the output layer: time over the matrix products' floor, peak extra memory, gradient error.

    python -m tools.bench loss                      CPU: T=2,048 H=256 V=32,000 fp32
    python -m tools.bench loss --device cuda        T=16,384 H=2,048 V=151,936 bf16

All times come from one run in which the contenders take turns. What could not be measured is listed with the reason.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from tools.bench import loss_contenders as contenders
from tools.bench.loss_contenders import Problem, Shape
from tools.bench.loss_memory import MEASURED, peak_of

SHAPES = {
    "cpu": Shape(2048, 256, 32_000, torch.float32, "cpu"),
    "cuda": Shape(16_384, 2048, 151_936, torch.bfloat16, "cuda"),
}
EXACT_ROWS = 512  # tokens whose float64 logits are alive at once


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


def rows_for(device: str) -> tuple[list[Row], list[str]]:
    rows = [
        Row("three matrix products", contenders.matrix_products, 3),
        Row("eager", contenders.eager, 3, is_exact=True),
        Row("ours", contenders.ours, 3, is_exact=True),
        Row("ours, 25% prompt 25% clipped", contenders.ours_half_inactive, 3),
        Row("ours, entropy bonus and k3", contenders.ours_with_entropy_and_kl, 3),
        Row("ours, log-probabilities only", contenders.ours_logprobs, 1),
    ]
    if device != "cuda":
        return rows, [f"{name}: needs a CUDA device" for name in contenders.PEERS]
    rows.append(Row("torch.compile + checkpoint", contenders.compiled_with_checkpoint(), 3, is_exact=True))
    peers, missing = contenders.installed_peers()
    rows += [Row(name, run, 3, is_exact=True) for name, run in peers.items()]
    return rows, [f"{name}: not installed" for name in missing]


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
    synchronize(problem.shape.device)
    start = time.perf_counter()
    run()
    synchronize(problem.shape.device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure_memory(rows: list[Row], problem: Problem) -> None:
    shape = problem.shape
    functions = {function: name for name, function in MEASURED.items()}
    for row in rows:
        if shape.device == "cuda":
            row.peak_bytes = device_peak(row, problem)
        elif row.run in functions:
            row.peak_bytes = peak_of(functions[row.run], shape)


def device_peak(row: Row, problem: Problem) -> int:
    problem.hidden.grad = problem.weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    row.run(problem)
    gradients = sum(x.grad.nbytes for x in (problem.hidden, problem.weight) if x.grad is not None)
    return torch.cuda.max_memory_allocated() - before - gradients


def measure_errors(rows: list[Row], problem: Problem) -> None:
    """Relative to gradients by autograd in float64 on the exact values of the inputs."""
    weight = problem.weight.detach().double().requires_grad_()
    hidden = problem.hidden.detach().double().requires_grad_()
    for first in range(0, problem.shape.tokens, EXACT_ROWS):
        span = slice(first, first + EXACT_ROWS)
        logits = hidden[span] @ weight.T
        logprobs = torch.log_softmax(logits, -1).gather(1, problem.targets[span, None])[:, 0]
        part = Problem(
            problem.shape, hidden, weight, problem.targets[span], problem.advantages[span], problem.loss_mask[span],
            problem.old_logprobs[span],
        )  # fmt: skip
        contenders.clipped_loss(logprobs, part).backward()
    for row in rows:
        if row.is_exact:
            timed(partial(row.run, problem), problem)
            row.errors = (error(problem.hidden.grad, hidden.grad), error(problem.weight.grad, weight.grad))


def error(actual: Any, exact: Any) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def measure_from_logits(problem: Problem, repeats: int) -> str:
    """From logits, in place: over one read and one write at the copy bandwidth of the same run."""
    logits = torch.empty(problem.shape.tokens, problem.shape.vocabulary, dtype=problem.shape.dtype, device="cuda")
    other = torch.empty_like(logits)
    copies = [timed(partial(other.copy_, logits), problem) for _ in range(repeats + 1)]
    del logits, other
    losses = [timed(contenders.from_logits(problem), problem) for _ in range(repeats + 1)]
    floor, ours = statistics.median(copies[1:]), statistics.median(losses[1:])
    return f"from logits, in place: {ours * 1e3:.1f} ms, copy {floor * 1e3:.1f} ms, ratio {ours / floor:.2f} (bar 1.50)"


def show(rows: list[Row], problem: Problem) -> None:
    shape = problem.shape
    product = rows[0].median / 3
    print(f"T={shape.tokens:,} H={shape.hidden_size:,} V={shape.vocabulary:,} {shape.dtype} on {machine(shape.device)}")
    print(f"matrix products: {shape.gemm_flops / product / 1e12:.3f} TFLOP/s\n")
    print(
        f"{'':34}{'ms':>10}{'best ms':>10}{'CPU ms':>10}{'x floor':>9}{'extra MiB':>11}{'dX error':>11}{'dW error':>11}"
    )
    for row in rows:
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}"
        errors = ("-", "-") if row.errors is None else tuple(f"{value:.2e}" for value in row.errors)
        ratio = row.median / (row.floor_products * product)
        times = f"{row.median * 1e3:>10.1f}{min(row.seconds) * 1e3:>10.1f}{min(row.cpu_seconds) * 1e3:>10.1f}"
        print(f"{row.name:34}{times}{ratio:>10.2f}{peak:>10}{errors[0]:>10}{errors[1]:>10}")


def machine(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def verdicts(rows: list[Row], device: str) -> list[str]:
    """Each bar that this run can judge."""
    by_name = {row.name: row for row in rows}
    eager, ours, floor = by_name["eager"], by_name["ours"], by_name["three matrix products"]
    half = by_name["ours, 25% prompt 25% clipped"]
    bars = [("half of the rows without gradient over all rows", half.median / ours.median, 0.70)]
    if device == "cpu":
        bars.append(("best time over eager's", min(ours.seconds) / min(eager.seconds), 1.0))
        bars.append(("least CPU time over eager's", min(ours.cpu_seconds) / min(eager.cpu_seconds), 1.0))
        if ours.peak_bytes is not None and eager.peak_bytes:
            bars.append(("extra memory over eager", ours.peak_bytes / eager.peak_bytes, 1 / 8))
    else:
        bonus, only = by_name["ours, entropy bonus and k3"], by_name["ours, log-probabilities only"]
        bars += [
            ("all rows over the floor", ours.median / floor.median, 1.06),
            ("with entropy bonus and k3 over the floor", bonus.median / floor.median, 1.10),
            ("log-probabilities over a third of the floor", only.median / (floor.median / 3), 1.10),
            ("extra memory in GiB", (ours.peak_bytes or 0) / 2**30, 1.5),
        ]
    if ours.errors and eager.errors:
        worst = max(mine / plain for mine, plain in zip(ours.errors, eager.errors, strict=True))
        bars.append(("gradient error over eager's", worst, 1.2))
    return [f"{'holds' if x <= bar else 'MISSED':>7}  {name}: {x:.3f} (bar {bar:.3g})" for name, x, bar in bars]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench loss", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=list(SHAPES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of torch on CPU")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    problem = contenders.make_problem(SHAPES[options.device])
    rows, missing = rows_for(options.device)
    measure_times(rows, problem, options.repeats)
    measure_memory(rows, problem)
    measure_errors(rows, problem)
    show(rows, problem)
    print("\n" + "\n".join(verdicts(rows, options.device)))
    if options.device == "cuda":
        print(measure_from_logits(problem, options.repeats))
    else:
        missing.append("the bars for a Hopper-class GPU, and from logits in place: no CUDA device was used")
    print("\nnot measured:\n" + "\n".join(f"  {line}" for line in missing))
