"""`torch` as megatron.core sees it on a CPU: what is named `cuda` there is answered by the CPU."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

CPU = torch.device("cpu")


class Proxy(ModuleType):
    """A module whose own attributes come first; everything else is the real module's.

    The real module is held by the instance: objects of megatron.core still ask while the interpreter shuts down and
    the globals of this file are gone.
    """

    def __init__(self, name: str, real: ModuleType) -> None:
        super().__init__(name)
        self.__dict__["_real"] = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)

    def answer(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def submodule(self, name: str) -> Proxy:
        """The proxy of `name`, made at the first request."""
        own = self.__dict__
        if name not in own:
            own[name] = Proxy(f"{self.__name__}.{name}", getattr(own["_real"], name))
        return own[name]


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


class Stream:
    """Work on a CPU is done when the call returns: all streams are the same and there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _done(self, *args: Any, **kwargs: Any) -> None:
        pass

    wait_stream = wait_event = synchronize = _done

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def query(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return hash(Stream)


class Event:
    """Already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _done(self, *args: Any, **kwargs: Any) -> None:
        pass

    record = wait = synchronize = _done

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 0.0


def device_calls(proxy: Proxy) -> None:
    proxy.submodule("cuda").answer(
        current_device=_always(CPU),  # megatron.core hands the answer to `device=` and to Tensor.to
        device_count=_always(1),
        set_device=_always(None),
        synchronize=_always(None),
        empty_cache=_always(None),
    )


def streams(proxy: Proxy) -> None:
    proxy.submodule("cuda").answer(
        Stream=Stream,
        Event=Event,
        current_stream=_always(Stream()),
        default_stream=_always(Stream()),
        stream=_always(contextlib.nullcontext()),
    )


def generator(proxy: Proxy) -> None:
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    proxy.submodule("cuda").answer(
        manual_seed=manual_seed,
        get_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
        set_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
    )


_FACTORIES = (
    *("tensor", "as_tensor", "scalar_tensor", "zeros", "ones", "empty", "full", "arange", "linspace", "eye"),
    *("rand", "randn", "randint", "empty_strided", "zeros_like", "ones_like", "empty_like", "full_like"),
    *("rand_like", "randn_like"),
)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda":
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return make


def factories(proxy: Proxy) -> None:
    proxy.answer(**{name: _on_cpu(getattr(torch, name)) for name in _FACTORIES})


def _asked_by_megatron() -> bool:
    """Whether the method that calls this was itself called from megatron.core."""
    caller = sys._getframe(2).f_globals.get("__name__", "")
    return caller.startswith("megatron.core.")


def tensor_type(tensor: type[torch.Tensor]) -> None:
    real = tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = real(self, *args, **kwargs)
        if isinstance(answer, str) and _asked_by_megatron():
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    tensor.type = type_  # type: ignore[method-assign]


def tensor_cuda(tensor: type[torch.Tensor]) -> None:
    real = tensor.cuda

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if _asked_by_megatron() else real(self, *args, **kwargs)

    tensor.cuda = cuda  # type: ignore[method-assign]
