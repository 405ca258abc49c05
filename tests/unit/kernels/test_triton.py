import ast
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import dapo_kernels
import pytest

CHECKS = (
    "linear",
    "from_logits",
    "extreme_logits",
    "token_terms",
    "narrow_output_in_the_memory_of_the_logits",
    "rows_beyond_the_grid",
    "a_factor_of_one_leaves_the_values_alone",
    "a_row_that_holds_nan_is_not_taken_for_a_number",
)
ROOT = Path(__file__).resolve().parents[3]
SOURCE = Path(dapo_kernels.__file__).with_name("triton_kernels.py")


def run_check(name):
    import torch

    torch.set_num_threads(1)
    from tests.unit.kernels import interpreted

    getattr(interpreted, name)()


@pytest.fixture(scope="module")
def interpreter():
    """A process that imports triton with its interpreter on; this one may have imported it without."""
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("check", CHECKS)
def test_triton_kernels_equal_the_definition_under_the_interpreter(interpreter, check):
    interpreter.submit(run_check, check).result(timeout=300)


@pytest.fixture(scope="module")
def kernels():
    """name -> syntax tree of each kernel and device function."""
    tree = ast.parse(SOURCE.read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def launch_limits():
    from dapo_kernels import triton_rows

    return triton_rows


@pytest.mark.parametrize("work_items", [0, 1, 65_535, 65_536, 10_000_000])
def test_a_grid_is_one_dimensional_and_within_what_ascend_launches(work_items):
    (programs,) = launch_limits().programs(work_items)
    assert 1 <= programs <= 65_535


@pytest.mark.parametrize("columns", [1, 17, 4096, 4097, 151_936, 1 << 20])
def test_a_block_fits_twice_into_the_unified_buffer(columns):
    block = launch_limits().block_columns(columns)
    live_values = launch_limits().kernels.LIVE_VALUES
    assert block & (block - 1) == 0
    assert 2 * 4 * live_values * block <= 192 * 1024


def test_no_kernel_holds_more_values_per_column_than_the_budget_assumes(kernels):
    """Names that hold a block at once: assigned from `tl.arange`, or from an expression over such a name."""
    for name, kernel in kernels.items():
        blocks = set()
        for node in ast.walk(kernel):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                names = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
                calls = {n.attr for n in ast.walk(node.value) if isinstance(n, ast.Attribute)}
                if "arange" in calls or (names & blocks and not calls & {"max", "sum"}):
                    blocks.add(node.targets[0].id)
        if "arange" not in ast.unparse(kernel) or name == "token_terms":
            continue  # works on scalars, or on a small block of tokens
        assert "offsets" in blocks
        assert len(blocks) <= launch_limits().kernels.LIVE_VALUES, f"{name}: {sorted(blocks)}"


def test_kernels_use_only_what_both_dialects_have(kernels):
    """Vector operations on a 1-D grid: no matrix products, atomics, float64 or other axes."""
    allowed = {
        "program_id", "num_programs", "load", "store", "arange", "where", "exp", "log", "abs", "max", "sum", "zeros",
        "cast", "debug_barrier", "constexpr", "int32", "int64", "float32",
    }  # fmt: skip
    for name, kernel in kernels.items():
        for node in ast.walk(kernel):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tl":
                assert node.attr in allowed, f"{name} uses tl.{node.attr}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.program_id", "tl.num_programs"):
                assert ast.unparse(node.args[0]) == "0", f"{name} uses another axis of the grid"


SIGNATURES = {
    "row_statistics": ("*fp32", "i32", "*i64", "*fp32", "i32", "i32", "fp32"),
    "row_gradient": ("*fp32", "i32", "*bf16", "i32", "*i64", "*i64", *["*fp32"] * 5, "i32", "i32", "fp32"),
    "token_terms": (*["*fp32"] * 6, "i32", *["fp32"] * 4),
    "loss_from_logits": (
        "*bf16", "i32", "*bf16", "i32", "*i8", "*i64", *["*fp32"] * 7, "i32", "i32", "i32", *["fp32"] * 6,
    ),
    "scale_in_place": ("*fp32", "*fp32", "i32"),
}  # fmt: skip
SWITCHES = {
    "BLOCK": 4096, "HAS_OLD": True, "HAS_WEIGHTS": True, "KL": 3, "CISPO": False, "HAS_BONUS": True, "NARROWS": True,
    "WRITES": True,
}  # fmt: skip


def compile_for_hopper(name):
    from dapo_kernels import triton_kernels
    from triton import compiler
    from triton.backends.compiler import GPUTarget

    kernel = getattr(triton_kernels, name)
    types = dict(zip(kernel.arg_names, SIGNATURES[name], strict=False))
    constants = {(i,): SWITCHES[arg] for i, arg in enumerate(kernel.arg_names) if arg not in types}
    signature = {arg: types.get(arg, "constexpr") for arg in kernel.arg_names}
    source = compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = compiler.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    return len(compiled.asm["cubin"])


@pytest.fixture(scope="module")
def compilation(tmp_path_factory):
    """Of all kernels in a process of its own: whoever imported triton here before may have chosen its interpreter."""
    program = "from tests.unit.kernels import test_triton as t\n"
    program += "for name in t.SIGNATURES: print('size of', name, t.compile_for_hopper(name), flush=True)"
    cache = str(tmp_path_factory.mktemp("cache"))
    settings = {"TRITON_CACHE_DIR": cache, "TRITON_DEFAULT_FP_FUSION": "1"}  # the latter is the default
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | settings
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.mark.parametrize("name", SIGNATURES)
def test_kernels_compile_for_hopper_without_a_gpu(name, compilation):
    found = re.search(rf"^size of {name} (\d+)$", compilation.stdout, re.MULTILINE)
    assert found, compilation.stderr
    assert int(found[1]) > 0
