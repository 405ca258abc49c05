"""Our NPU adapter and our fakes against the published torch_npu and MindSpeed; only where REAL_ASCEND names them.

python -m tests.npu.real.prepare torch_npu-*.whl MINDSPEED FOLDER
REAL_ASCEND=FOLDER pytest tests/npu/real
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.npu.test_contracts import FUSED, STOPPED, matches

ROOT = Path(__file__).resolve().parents[3]
FAKES = ROOT / "tests" / "npu" / "fakes"
FOLDER = os.environ.get("REAL_ASCEND", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="REAL_ASCEND does not name the folder of tests/npu/real/prepare.py")

# What MindSpeed and torch_npu say themselves of what the fakes refuse in their place.
THEIR_WORDS = {
    "repatch with a Namespace": "AttributeError: 'Namespace' object has no attribute 'items'",
    "batch-invariant attention": "RuntimeError: the patch of forward exist",
    "pickled config": "PicklingError: .*TransformerConfig",
    "replaced config": "AttributeError: 'TransformerConfig' object has no attribute",
    "another process gets a result with a gradient": "RuntimeError: .*non-leaf tensor which requires_grad",
}


def environment(libraries: str) -> dict[str, str]:
    """Of a process on whose path the real packages come first."""
    path = os.pathsep.join([f"{FOLDER}/packages", str(ROOT), str(ROOT / "kernels")])
    kept = {name: value for name, value in os.environ.items() if name not in ("DAPO_PLATFORM", "RANK", "LOCAL_RANK")}
    return kept | {"PYTHONPATH": path, "LD_LIBRARY_PATH": libraries, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


def run(*arguments: str, libraries: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", *arguments]
    variables = environment(libraries) | {"TRITON_INTERPRET": "1"}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=3600)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Any:
    answer = tmp_path_factory.mktemp("real") / "answer.json"
    done = run("-m", "tests.npu.real.process", str(answer), libraries=f"{FOLDER}/lib")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(answer.read_text())


def of_fakes() -> dict[str, str]:
    """Operator -> its declaration. The file is read alone: the fakes' other modules are not for this process."""
    spec = importlib.util.spec_from_file_location("schemas", FAKES / "npu_operators" / "schemas.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SCHEMAS


@pytest.mark.parametrize("operator", of_fakes())
def test_the_fakes_declare_an_operator_as_torch_npu_does(told: Any, operator: str) -> None:
    ours = torch._C.parse_schema(f"npu::{operator}{of_fakes()[operator]}")
    assert told["declared"][operator] == str(ours)


def test_results_have_the_shapes_of_torch_npus_meta_kernels(told: Any) -> None:
    for operator, (theirs, ours) in told["shapes"].items():
        assert theirs == ours, operator


def test_importing_torch_npu_replaces_the_way_to_another_process(told: Any) -> None:
    found = told["reduce_tensor"]
    assert found["module"].startswith("torch_npu.")
    assert len(found["arguments"]) == 15
    assert found["arguments"][6] == "storage_device"


def test_without_cann_our_adapter_says_what_is_missing() -> None:
    program = "from dapo_mcore.platform import adapt_megatron; adapt_megatron()"
    done = run("-c", program, libraries="")
    says = "UnusableDeviceError: torch_npu cannot be imported (libhccl.so.*source CANN's set_env.sh"
    assert matches(says, done.stderr), done.stderr


def test_mindspeed_stands_behind_the_names_of_transformer_engine(told: Any) -> None:
    found = told["replaced"]
    assert found["te"]
    assert all(module.startswith("mindspeed.te.") for module in found["modules"])
    assert found["arguments_restored"]


def test_a_wrong_caller_is_stopped_as_under_the_fakes(told: Any) -> None:
    for caller, says in told["wrong"].items():
        assert matches(THEIR_WORDS.get(caller, STOPPED[caller]), says), (caller, says)


def test_mindspeeds_values_stay_out_of_our_configs(told: Any) -> None:
    assert told["no_value_leaks"] == ""


def test_torch_npu_and_mindspeed_make_no_library_print_more(told: Any) -> None:
    assert told["quiet"] == ""


def test_a_policy_in_bf16_has_no_parameter_in_float32(told: Any) -> None:
    assert told["one_dtype"] == ""


def test_a_resumed_policy_trains_on_as_if_it_had_stayed(told: Any) -> None:
    assert told["resumed"] == []


def test_updates_through_mindspeeds_layers_are_those_of_float64(told: Any) -> None:
    for name, found in told["certified"].items():
        assert found["cases"], (name, found["error"])
        assert all(case["within"] for case in found["cases"]), (name, found["cases"])


def test_fused_rope_and_permutation_are_at_work_where_they_are_asked_for(told: Any) -> None:
    for name, found in told["certified"].items():
        assert FUSED.intersection(found["operators"]) == (FUSED if name.startswith("fused") else set()), name


def test_attention_is_packed_and_causal_or_that_of_a_tower(told: Any) -> None:
    reached = {
        name: {(r["layout"], r["has_mask"], r["sparse_mode"]) for r in found["records"]}
        for name, found in told["certified"].items()
    }
    assert reached["text"] == {("TND", True, 2)}
    assert reached["vision"] == {("TND", True, 2), ("TND", False, 0)}
    assert reached["context parallel"] == {("TND", True, 3), ("TND", False, 0)}
