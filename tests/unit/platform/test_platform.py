"""The platform is found, not named; Megatron is adapted once, early, and only where it must be."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch

from dapo_mcore import platform as platforms
from dapo_mcore.platform import UnusableDeviceError, adapt_megatron, platform
from dapo_mcore.platform.megatron_cpu import hook
from dapo_mcore.platform.megatron_cpu.patches import PATCHES

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has an accelerator")


@on_cpu
def test_without_an_accelerator_the_platform_is_the_cpu() -> None:
    found = platform()
    assert (found.name, found.device, found.collective_backend) == ("cpu", torch.device("cpu"), "gloo")
    assert not found.has_transformer_engine


@on_cpu
def test_memory_grows_with_what_is_held() -> None:
    before = platform().memory_stats()
    held = torch.ones(64 << 20, dtype=torch.uint8)
    after = platform().memory_stats()
    assert after.used - before.used >= 0.9 * held.nbytes
    assert after.used <= after.peak * 1.01 <= after.total


@pytest.mark.parametrize("answer_for_cuda", [False, True])  # torch_npu makes torch.cuda answer for the NPU
def test_an_installed_torch_npu_is_an_npu_whatever_torch_cuda_says(
    answer_for_cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: answer_for_cuda)
    monkeypatch.setattr(platforms.importlib.util, "find_spec", lambda name: name == "torch_npu" or None)
    platform.cache_clear()
    with pytest.raises(UnusableDeviceError, match=r"torch_npu cannot be imported.*set_env\.sh.*DAPO_PLATFORM=cpu"):
        platform()
    monkeypatch.undo()
    assert platform().name in ("cpu", "cuda")


@on_cpu
def test_the_environment_may_name_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms.importlib.util, "find_spec", lambda name: name == "torch_npu" or None)
    monkeypatch.setenv("DAPO_PLATFORM", "cpu")
    platform.cache_clear()
    assert platform().name == "cpu"
    monkeypatch.setenv("DAPO_PLATFORM", "tpu")
    platform.cache_clear()
    with pytest.raises(UnusableDeviceError, match="DAPO_PLATFORM=tpu: no such platform; use one of cpu, cuda, npu"):
        platform()
    monkeypatch.undo()
    assert platform().name == "cpu"


@on_cpu
def test_adapting_twice_installs_one_import_hook() -> None:
    adapt_megatron()
    adapt_megatron()
    assert sum(isinstance(finder, hook._Finder) for finder in sys.meta_path) == 1


@on_cpu
def test_adapting_leaves_torch_itself_alone() -> None:
    adapt_megatron()
    assert torch.ones(1).type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(1).cuda()


@on_cpu
def test_adapting_after_megatron_was_imported_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    adapt_megatron()
    importlib.import_module("megatron.core")
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if not isinstance(finder, hook._Finder)])
    before = list(sys.meta_path)
    early = r"megatron.core was imported before dapo_mcore.platform.adapt_megatron\(\); import dapo_mcore.actor"
    with pytest.raises(RuntimeError, match=early):
        adapt_megatron()
    assert sys.meta_path == before


def test_with_cuda_nothing_is_changed() -> None:
    seen_as_cuda = """
import sys, torch
type_, cuda = torch.Tensor.type, torch.Tensor.cuda
torch.cuda.is_available, torch.cuda.set_device = lambda: True, lambda device: None
from dapo_mcore.platform import adapt_megatron, platform
finders = list(sys.meta_path)
adapt_megatron()
assert platform().name == "cuda" and platform().collective_backend == "cpu:gloo,cuda:nccl"
platform().make_deterministic()
assert torch.are_deterministic_algorithms_enabled()
assert sys.meta_path == finders and (torch.Tensor.type, torch.Tensor.cuda) == (type_, cuda)
"""
    subprocess.run([sys.executable, "-c", seen_as_cuda], timeout=120, check=True)


def test_every_patch_is_named_once_and_says_why() -> None:
    labels = [patch.label for patch in PATCHES]
    assert len(set(labels)) == len(labels)
    assert all(len(patch.reason) > 10 for patch in PATCHES)


@on_cpu
@pytest.mark.parametrize("label", [p.label for p in PATCHES if p.module.startswith("megatron.")])
def test_every_patched_module_exists_and_was_changed(label: str) -> None:
    adapt_megatron()
    patch = next(p for p in PATCHES if p.label == label)
    module = importlib.import_module(patch.module)
    changed = [
        value
        for owner in (module, *(v for v in vars(module).values() if isinstance(v, type)))
        for value in vars(owner).values()
        if (getattr(value, "__module__", None) or "").startswith("dapo_mcore.platform.megatron_cpu")
    ]
    without_new_objects = {
        "no-jit": ("jit_fuser", module.__dict__.get("noop_decorator")),
        "router-gemm": ("te_general_gemm", None),
    }
    if label in without_new_objects:
        name, value = without_new_objects[label]
        assert vars(module)[name] is value
    else:
        assert changed
