"""Who may import what, and where a device may be called by its name."""

import ast
import io
import json
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dapo_mcore"
KERNELS = ROOT / "kernels" / "dapo_kernels"
# library -> the only places of dapo_mcore that may import it
HOMES = {
    "megatron": ("actor", "weights", "checkpoint", "platform"),
    "mindspeed": ("platform",),
    "torch_npu": ("platform",),
    "vllm": ("rollout",),
    "ray": ("rollout",),
    "hydra": ("train.py",),
}
DEVICE_WORD = re.compile(r"(?<![A-Za-z0-9_])(cuda|npu|torch_npu|hccl|nccl)(?![A-Za-z0-9_])", re.IGNORECASE)
DEVICE_PLACES = ("platform",)
AGENTS = {"torchrun.py": ("torch",), "ray_nodes.py": ("ray",)}  # of launch/: they watch ranks, once all is installed
DRAWERS = ("util", "utils", "common", "base", "core", "misc", "helpers")


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def place(path: Path) -> str:
    """The station of a file of the package: its folder, or the file itself at the top."""
    return path.relative_to(PACKAGE).parts[0]


def imported_modules(source: str) -> set[str]:
    """Dotted names of everything imported, at whatever depth; `from a import b` counts as a and as a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def libraries(path: Path) -> set[str]:
    """Top-level names imported by a file, without the standard library."""
    return {name.partition(".")[0] for name in imported_modules(path.read_text())} - sys.stdlib_module_names


def device_words(source: str) -> list[str]:
    """Device names in code: identifiers and strings, not comments and not documentation."""
    prose = {
        node.value.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        in_prose = token.type == tokenize.STRING and token.start[0] in prose
        if token.type in (tokenize.NAME, tokenize.STRING) and not in_prose and DEVICE_WORD.search(token.string):
            found.append(f"{token.start[0]}: {token.string}")
    return found


def test_the_reader_of_imports_sees_imports_inside_functions_and_submodules():
    source = "import a.b\ndef f():\n    from c import d\n"
    assert imported_modules(source) == {"a.b", "c", "c.d"}


def test_the_reader_of_device_words_skips_prose_and_longer_words():
    source = '"""About cuda."""\nx = torch.cuda\ny = "nccl"  # npu\nmodel_parallel_cuda_manual_seed(1)\n'
    assert device_words(source) == ["2: cuda", '3: "nccl"']


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_at_its_stations_only(library):
    strangers = [
        str(path.relative_to(ROOT))
        for path in python_files(PACKAGE)
        if library in libraries(path) and place(path) not in HOMES[library]
    ]
    assert strangers == []


@pytest.mark.parametrize("library", ["megatron", "vllm", "hydra"])
def test_the_search_for_a_library_finds_it_at_its_station(library):
    assert any(library in libraries(path) for path in python_files(PACKAGE))


def test_algo_imports_torch_and_plain_types_only():
    # observe.metrics holds the fraction that metrics are made of, and imports nothing
    allowed = re.compile(r"(__future__|torch|dapo_mcore\.(types|algo|observe\.metrics))(\.|$)")
    files = python_files(PACKAGE / "algo")
    assert files
    for path in files:
        names = {name for name in imported_modules(path.read_text()) if not allowed.match(name)}
        foreign = {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names}
        assert foreign == set(), path


def test_the_kernels_import_torch_and_triton_only():
    files = python_files(KERNELS)
    assert files
    for path in files:
        assert libraries(path) <= {"torch", "triton", "dapo_kernels"}, path


@pytest.fixture(scope="module")
def loaded_after():
    """Module -> the libraries in a fresh process once it and those before it are imported."""
    program = """
import importlib, json, sys
loaded = {}
def load(name):
    assert name not in sys.modules, name
    importlib.import_module(name)
    loaded[name] = sorted({module.partition(".")[0] for module in sys.modules})
for name in ("dapo_mcore.train", "dapo_mcore.types", "dapo_mcore.rollout.colocated", "dapo_mcore.weights"):
    load(name)
sys.modules["triton"] = None  # whoever imports it now fails
load("dapo_kernels")
print(json.dumps(loaded))
"""
    path = os.pathsep.join([str(ROOT), str(KERNELS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_kernels_import_without_triton(loaded_after):
    assert "dapo_kernels" in loaded_after["dapo_kernels"]


def test_options_and_the_entry_point_are_imported_without_torch(loaded_after):
    assert "hydra" in loaded_after["dapo_mcore.train"]
    assert "torch" not in loaded_after["dapo_mcore.train"]


def test_vllm_is_imported_by_an_engine_and_not_before(loaded_after):
    assert "vllm" not in loaded_after["dapo_mcore.rollout.colocated"]


def test_importing_the_weights_does_not_import_megatron(loaded_after):
    assert "torch" in loaded_after["dapo_mcore.weights"]
    assert "megatron" not in loaded_after["dapo_mcore.weights"]


def test_devices_are_called_by_name_on_the_platform_only():
    files = [path for path in python_files(PACKAGE) if place(path) not in DEVICE_PLACES]
    named = {str(path.relative_to(ROOT)): words for path in files if (words := device_words(path.read_text()))}
    assert named == {}


def test_the_platform_does_call_devices_by_name():
    assert any(device_words(path.read_text()) for path in python_files(PACKAGE / "platform"))


def test_whatever_starts_on_a_bare_machine_needs_the_standard_library_only():
    for path in python_files(ROOT / "launch"):
        assert libraries(path) <= {"launch", *AGENTS.get(path.name, ())}, path


def test_no_module_is_a_drawer_for_everything():
    named = [path for folder in (PACKAGE, KERNELS, ROOT / "tools", ROOT / "launch") for path in python_files(folder)]
    assert [str(path) for path in named if path.stem in DRAWERS or path.parent.name in DRAWERS] == []


def test_the_package_does_not_import_tools_or_tests():
    for path in (*python_files(PACKAGE), *python_files(KERNELS)):
        assert not libraries(path) & {"tools", "tests", "launch"}, path
