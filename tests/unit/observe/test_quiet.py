"""What a library says although nothing is wrong."""

from __future__ import annotations

import logging
import sys
import warnings

import pytest

from dapo_mcore.observe.quiet import LOGGERS, quiet_libraries


@pytest.fixture
def quiet(monkeypatch):
    """`quiet_libraries`, undone after the test."""
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    with warnings.catch_warnings():
        yield quiet_libraries
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_torch_does_not_warn_of_a_triton_that_a_cpu_has_none_of(quiet, monkeypatch, capfd):
    from torch._library.triton import get_inner_triton_kernels

    monkeypatch.setitem(sys.modules, "triton.runtime.autotuner", None)
    get_inner_triton_kernels(print)
    assert "Triton not available" in capfd.readouterr().err
    quiet()
    get_inner_triton_kernels(print)
    assert capfd.readouterr().err == ""
