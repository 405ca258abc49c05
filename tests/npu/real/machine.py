"""What a host without NPU and CANN lacks: names that MindSpeed imports, one device, kernels. All of it is the CPU."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import library

from dapo_mcore.platform.megatron_cpu.torch_proxy import Stream

FAKES = Path(__file__).resolve().parents[1] / "fakes"
CPU = torch.device("cpu")
SORTING = "mindspeed.ops.triton.sort_chunks_by_idx"
FACTORIES = (
    *("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "linspace", "eye", "rand", "randn", "randint"),
    *("empty_strided", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
)


class _Absent(ModuleType):
    """A package that is imported and never called."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


def install() -> list[library.Library]:
    """Before MindSpeed, transformers and Megatron-Core. The kernels live as long as the answer does."""
    import torch_npu  # noqa: F401

    from dapo_mcore.platform import megatron_cpu

    sys.path.append(str(FAKES))
    for name in ("acl", "torchair", "torchair.ge"):
        sys.modules[name] = _Absent(name)
    megatron_cpu.apply()
    _device()
    _triton_of_ascend()
    _compiled_operators()
    return [_kernels()]


def _triton_of_ascend() -> None:
    """Under TRITON_INTERPRET=1 the kernels that sort tokens run on the CPU.

    triton-ascend lets a kernel be tuned by names that are no arguments of it; upstream Triton refuses.
    """
    import triton

    tune = triton.autotune

    def autotune(configs: Any, key: list[str], **options: Any) -> Callable[[Any], Any]:
        return lambda kernel: tune(configs[:1], [name for name in key if name in kernel.arg_names], **options)(kernel)

    triton.autotune = autotune
    found = importlib.util.find_spec("mindspeed")
    assert found is not None
    file = Path(next(iter(found.submodule_search_locations or ())), "ops", "triton", "sort_chunks_by_idx.py")
    sys.modules[SORTING] = module = ModuleType(SORTING)
    source = file.read_text().replace("device.type != 'npu'", "device.type != 'cpu'")
    exec(compile(source, file, "exec"), vars(module))


def _compiled_operators() -> None:
    from mindspeed.op_builder.builder import MindSpeedOpBuilder
    from npu_operators import COMPILED

    for name, computed in COMPILED.items():
        MindSpeedOpBuilder._loaded_ops[name] = SimpleNamespace(**{name: computed})


def _device() -> None:
    """torch.npu and torch.device("npu") are the CPU."""
    npu: Any = torch.npu
    fake = _of_fakes("device")
    for name in ("device_count", "set_device", "synchronize", "empty_cache", "memory_allocated", "mem_get_info"):
        setattr(npu, name, getattr(fake, name))
    for name in ("manual_seed", "manual_seed_all", "get_rng_state", "set_rng_state", "max_memory_allocated"):
        setattr(npu, name, getattr(fake, name))
    npu.current_stream = lambda device=None: Stream()
    npu.stream = lambda stream: contextlib.nullcontext()
    npu.current_device = lambda: CPU  # callers hand it to `device=`
    npu.is_available = npu.is_bf16_supported = lambda: True
    torch.accelerator.current_device_index = lambda: 0
    _of_fakes("collectives").register()
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.npu = lambda self, *args, **kwargs: self
    torch.Tensor.type = _type_on_npu(torch.Tensor.type)


def _of_fakes(name: str) -> ModuleType:
    """A file of the fake torch_npu, as the real one has its name."""
    spec = importlib.util.spec_from_file_location(f"fake_{name}", FAKES / "torch_npu" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if isinstance(device, (str, torch.device)) and torch.device(device).type in ("cuda", "npu"):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return make


def _type_on_npu(of_cpu: Callable[..., Any]) -> Callable[..., Any]:
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = of_cpu(self, *args, **kwargs)
        return answer.replace("torch.", "torch.npu.", 1) if isinstance(answer, str) else answer

    return type_


def _kernels() -> library.Library:
    """torch_npu's own operators, computed as the fakes do."""
    from npu_operators import COMPUTED

    kernels = library.Library("npu", "IMPL")
    for name, computed in COMPUTED.items():
        for key in ("CPU", "AutogradCPU"):
            kernels.impl(name, computed, key)
    return kernels
