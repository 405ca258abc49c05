"""An import hook that changes modules of megatron.core right after they were executed."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from dapo_mcore.platform.megatron_cpu.torch_proxy import Proxy

PACKAGE = "megatron.core"
PROXY = "torch (as seen by megatron.core)"  # `Patch.module` of changes to the proxy, made before any import
TENSOR = "torch.Tensor (for callers in megatron.core)"  # `Patch.module` of changes to the class


@dataclass(frozen=True, slots=True)
class Patch:
    """One change: what it mends, where, and what happens without it."""

    label: str
    module: str
    reason: str
    apply: Callable[[Any], None]  # takes the module, the proxy or the class that `module` names


def is_covered(module_name: str) -> bool:
    return module_name == PACKAGE or module_name.startswith(PACKAGE + ".")


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader, proxy: ModuleType, patches: Sequence[Patch]) -> None:
        self._inner, self._proxy, self._patches = inner, proxy, patches

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)  # class bodies and decorators still see the real torch
        if vars(module).get("torch") is torch:
            vars(module)["torch"] = self._proxy
        for patch in self._patches:
            if patch.module == module.__name__:
                patch.apply(module)

    def __getattr__(self, name: str) -> Any:  # get_source and the like, for inspect and torch.jit
        return getattr(self._inner, name)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, proxy: ModuleType, patches: Sequence[Patch]) -> None:
        self._proxy, self._patches = proxy, patches

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not is_covered(fullname):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._proxy, self._patches)
        return spec


def is_installed() -> bool:
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def install(patches: Sequence[Patch]) -> None:
    early = sorted(name for name in sys.modules if is_covered(name))
    if early:  # names that others took with `from x import y` would keep the unpatched object
        raise RuntimeError(
            f"{early[0]} was imported before dapo_mcore.platform.adapt_megatron(); "
            "import dapo_mcore.actor (or call adapt_megatron) first"
        )
    proxy = Proxy("torch", torch)
    for patch in patches:
        if patch.module == PROXY:
            patch.apply(proxy)
        elif patch.module == TENSOR:
            patch.apply(torch.Tensor)
    sys.meta_path.insert(0, _Finder(proxy, [p for p in patches if p.module not in (PROXY, TENSOR)]))
