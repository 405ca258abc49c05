"""Every check, in the order in which they are made: what fails early explains what fails later."""

from __future__ import annotations

from pathlib import Path

from tools.acceptance import training
from tools.acceptance.check import ACCELERATORS, Check, Command, Here, module, ranks

FUSED = "moe_permute_fusion=1,apply_rope_fusion=1"
UNFUSED = "use_fused_rmsnorm=0,use_fused_swiglu=0,moe_grouped_gemm=0"
# devices, layout; what the layout does not use is data parallel
LAYOUTS = (
    (1, ""),
    (1, FUSED),
    (1, UNFUSED),
    (2, ""),
    (2, "tp=2,sp=1"),
    (2, "pp=2"),
    (2, "cp=2"),
    (2, "ep=2"),
    (4, "tp=2,sp=1,ep=4"),
    (4, "tp=2,sp=1,pp=2"),
    (4, "cp=2,ep=2"),
    (8, "tp=2,sp=1,cp=2,ep=4"),
    (8, "tp=2,sp=1,pp=2,vpp=2,ep=4"),
)
NAMES = {FUSED: "fused", UNFUSED: "unfused"}


def certificate(devices: int, layout: str, dtype: str) -> Check:
    name = NAMES.get(layout) or layout.replace("=", "").replace(",", "-") or f"dp{devices}"

    def commands(here: Here, out: Path) -> list[Command]:
        quick = ["--quick"] if here.is_small else []
        asked = ["--json", "--dtype", dtype, *quick, *(["--layout", layout] if layout else [])]
        return [ranks(here, devices, "tools.certify", *asked)]

    return Check(
        f"certificate-{name}-{dtype}",
        f"updates with {layout or f'data parallel {devices}'} in {dtype} equal those of one float64 process",
        commands,
        ACCELERATORS if layout in NAMES else ("cpu", *ACCELERATORS),
        least_devices=devices,
    )


def doctor(here: Here, out: Path) -> list[Command]:
    return [module("tools.doctor", here.platform, "--json")]


def device_tests(here: Here, out: Path) -> list[Command]:
    report = out / "tests.xml"
    pytest = module("pytest", "tests/gpu", "-q", f"--junit-xml={report}")
    return [pytest, module("tools.acceptance.evidence", "tests", report)]


def loss(here: Here, out: Path) -> list[Command]:
    repeats = 3 if here.is_small else 10
    return [module("tools.bench", "loss", "--device", here.platform, "--repeats", repeats, "--json")]


def push(here: Here, out: Path) -> list[Command]:
    models, repeat = (["tiny"], 3) if here.is_small else (["moe-200M", "moe-11GB"], 12)
    return [module("tools.bench", "push", "--json", "--repeat", repeat, "--model", *models)]


def pushed(here: Here, out: Path) -> list[Command]:
    models = ["tiny"] if here.is_small else ["moe-200M", "dense-200M"]
    return [module("tools.bench", "push", "--json", "--check", "--model", *models)]


def turns(here: Here, out: Path) -> list[Command]:
    return [module("tools.bench", "turns", "--json", "--model", "moe-200M")]


def convert(here: Here, out: Path) -> list[Command]:
    small = ["--layers", 2, "--repeats", 1] if here.is_small else []
    return [module("tools.bench", "convert", "--json", "--out", out, *small)]


CHECKS = (
    Check("doctor", "versions that work together", doctor, limit_s=120),
    Check("device-tests", "the kernels as compiled code against float64", device_tests, ACCELERATORS),
    *(certificate(devices, layout, dtype) for devices, layout in LAYOUTS for dtype in ("bf16", "fp32")),
    Check("loss", "time, memory and error of the policy loss, every backend", loss),
    Check("push-equal", "what a pushed engine samples is what a freshly loaded one samples", pushed),
    Check("push", "speed of a push and the share of its attestation", push, limit_s=3600),
    Check("turns", "memory that sleep and offload give back, and the time of a turn", turns, ACCELERATORS),
    Check("convert", "conversion of weights beside cp on the same disk", convert),
    *training.CHECKS,
)
