"""Without an NPU: the fakes in `fakes/` let our code through and stop every caller that would go wrong on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAKES = ROOT / "tests" / "npu" / "fakes"


def environment() -> dict[str, str]:
    """Of a process on whose path the fakes come first."""
    path = os.pathsep.join([str(FAKES), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    kept = {name: value for name, value in os.environ.items() if name not in ("DAPO_PLATFORM", "RANK", "LOCAL_RANK")}
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Any:
    answer = tmp_path_factory.mktemp("contract") / "answer.json"
    command = [sys.executable, "-m", "tests.npu.contract_process", str(answer)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(answer.read_text())


# caller -> what stops it: the fakes' ContractError, or our own refusal with cause and way out
STOPPED = {
    "adaptor with arguments": "ContractError: the command line is empty: ['--hidden-size', '4096']",
    "adaptor without torch_npu": "ContractError: torch_npu is imported first",
    "adaptor after megatron": "ContractError: megatron.core is imported later",
    "adaptor after transformers": "ContractError: transformers is imported later",
    "adaptor after vllm": "ContractError: vllm is imported later",
    "ours after megatron": "UnusableDeviceError: megatron.core was imported before MindSpeed.*import dapo_mcore.actor",
    "ours after vllm": "UnusableDeviceError: vllm was imported before MindSpeed",
    "ours after transformers": "UnusableDeviceError: transformers was imported before MindSpeed",
    "no CANN": "UnusableDeviceError: torch_npu cannot be imported (libhccl.so.*source CANN's set_env.sh",
    "torch for CUDA": "UnusableDeviceError: torch.*is a build for CUDA.*install the CPU build",
    "more processes than devices": "UnusableDeviceError: LOCAL_RANK=2, but this process sees 2 NPUs.*npu-smi info",
    "unknown platform": "UnusableDeviceError: DAPO_PLATFORM=tpu.*cpu, cuda, npu",
    "no MindSpeed": "UnusableDeviceError: MindSpeed is not installed.*core_r0.16.0",
    "unknown MindSpeed": "UnusableDeviceError: MindSpeed at /dev has no megatron_adaptor.py.*core_r0.16.0",
    "MindSpeed that leaves torch alone": "UnusableDeviceError: MindSpeed at .* works in a way unknown.*core_r0.16.0",
    "MindSpeed that replaces nothing": "UnusableDeviceError: MindSpeed left TEColumnParallelLinear of",
    "repatch with a Namespace": "ContractError: repatch takes a dict, not a Namespace",
    "repatch twice": "ContractError: repatch once",
    "repatch after the groups": "ContractError: repatch before initialize_model_parallel",
    "repatch after a config": "ContractError: repatch before the first TransformerConfig",
    "no flash attention": "ContractError: use_flash_attn is True",
    "batch-invariant attention": "ContractError: batch-invariant attention",
    "sparse mode 3": "ContractError: sparse_mode is 0 or 2",
    "allgather dispatcher": "ContractError: the dispatcher is alltoall",
    "fused rope without its type": "ContractError: use_fused_rotary_pos_emb asks for position_embedding_type",
    "MindSpeed's context parallelism": "ContractError: its context parallelism takes other rows",
    "pickled config": "ContractError: .*cannot be pickled",
    "replaced config": "ContractError: dataclasses.replace",
    "configured after the groups": "UnusableDeviceError: Megatron's groups exist already",
    "configured anew": "UnusableDeviceError: MindSpeed is set up already, without {'apply_rope_fusion': True, ",
    "configured back": "UnusableDeviceError: MindSpeed is set up already, without {'apply_rope_fusion': False, ",
    "layers left alone": "UnusableDeviceError: MindSpeed left TEGroupedLinear",
    "Transformer Engine not found": "UnusableDeviceError: MindSpeed left HAVE_TE of",
    "vision tower of causal type": "ContractError: full attention has sparse mode 0, not 2 without a mask",
    "padding type of packed text": "ContractError: full attention has sparse mode 0, not 2 without a mask",
    "zigzag sequences for MindSpeed": "ContractError: rank r of MindSpeed's context parallelism",
    "mask for a tower": "ContractError: a triangular mask goes with sparse mode 2 or 3, not 0",
    "mask without its mode": "ContractError: a triangular mask goes with sparse mode 2 or 3, not 0",
    "mask of the batch's size": "ContractError: the causal mask is bool [2048, 2048]",
    "mask of what is seen": "ContractError: True is masked",
    "sequences not packed": "ContractError: sequences are packed: layout TND",
    "a world of NPUs alone": "ContractError: a world with NPUs also serves tensors on the host",
    "labels of another shard": "ContractError: labels are columns of the logits",
    "another process gets an NZ tensor": "ContractError: a tensor for another process is in ND format",
    "another process gets a result with a gradient": "ContractError: a tensor for another process is detached",
}


def matches(pattern: str, text: str) -> bool:
    """Parts of `pattern`, which `.*` separates, one after the other in `text`."""
    position = 0
    for part in pattern.split(".*"):
        position = text.find(part, position)
        if position < 0:
            return False
        position += len(part)
    return True


@pytest.mark.parametrize("caller", STOPPED)
def test_a_wrong_caller_is_stopped_by_what_it_does_wrong(told: Any, caller: str) -> None:
    assert matches(STOPPED[caller], told["wrong"][caller]), told["wrong"][caller]


def test_every_wrong_caller_is_in_the_table(told: Any) -> None:
    assert told["wrong"].keys() == STOPPED.keys()


def test_the_platform_is_found_by_torch_npu_and_talks_over_gloo_and_hccl(told: Any) -> None:
    right = told["right"]
    assert right["platform"] == ["npu", "cpu:gloo,npu:hccl", True, {"resources": {"NPU": 2}}]
    assert right["backends"] == ["cpu:gloo,npu:hccl"]
    assert 0 < right["memory"]["used"] < right["memory"]["peak"]
    assert right["memory"]["total"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # the fake's


def test_the_command_line_is_back_after_mindspeed_was_imported(told: Any) -> None:
    assert told["right"]["arguments_restored"]


def test_mindspeed_is_repatched_once_before_two_layouts_of_one_process(told: Any) -> None:
    (switches,) = told["right"]["repatched"]
    assert switches["use_flash_attn"]
    assert switches["use_fused_rmsnorm"]


def test_the_policy_is_built_of_mindspeeds_layers(told: Any) -> None:
    names = told["right"]["parameters"]
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in names
    assert "decoder.layers.0.mlp.experts.linear_fc1.weight0" in names
    assert told["right"]["gradient_norm"] > 0


@pytest.mark.parametrize(("layouts", "mode"), [("two layouts", 2), ("CP2", 3), ("fused", 2)])
def test_updates_of_two_ranks_are_those_of_float64(told: Any, layouts: str, mode: int) -> None:
    """MindSpeed loses sums of float64, keeps the groups of the first layout and cuts sequences in another way."""
    found = told["certified"][layouts]
    assert found["cases"], found["error"]
    assert all(case["within"] for case in found["cases"]), found["cases"]
    assert {record["sparse_mode"] for record in found["records"]} == {mode}


FUSED = {
    "npu_rotary_position_embedding",
    "npu_moe_token_permute_with_routing_map",
    "npu_moe_token_permute_with_routing_map_grad",
    "_npu_moe_token_unpermute_with_routing_map",
    "npu_moe_token_unpermute_with_routing_map_grad",
}


def test_fused_rope_and_permutation_are_at_work_where_they_are_asked_for(told: Any) -> None:
    for name, found in told["certified"].items():
        assert FUSED.intersection(found["operators"]) == (FUSED if name.startswith("fused") else set()), name


def test_text_is_packed_and_causal_with_the_triangle_and_mode_2(told: Any) -> None:
    records = told["right"]["text"]
    assert records
    assert {(r["layout"], r["has_mask"], r["sparse_mode"]) for r in records} == {("TND", True, 2)}
    assert {tuple(r["ends"]) for r in records} == {(0, 12, 25, 34)}  # 5 + 7, 4 + 9 and 6 + 3 tokens


def test_a_vision_tower_attends_fully_picture_by_picture_without_a_mask(told: Any) -> None:
    right = told["right"]
    assert right["tower_built_with"] == "flash_attention_2"
    assert {(r["layout"], r["has_mask"], r["sparse_mode"]) for r in right["tower"]} == {("TND", False, 0)}
    assert {tuple(r["ends"]) for r in right["tower"]} == {(16, 24)}  # patches
    assert right["tower_error"] < 1e-5


@pytest.mark.parametrize("model", ["dense", "experts", "vision"])
def test_no_field_of_a_transformer_config_is_open_to_mindspeeds_switches(told: Any, model: str) -> None:
    assert told["right"]["foreign"][model] == []


def test_an_open_config_would_have_been_filled(told: Any) -> None:
    assert told["right"]["foreign"]["open"] != []


@pytest.mark.parametrize(
    "check",
    [
        "loss_and_gradients",
        "from_logits_with_excluded_columns",
        "parts_of_a_row_merge_as_those_of_torch",
        "chosen_by_name_only",
    ],
)
def test_the_loss_over_the_fused_cross_entropy_is_that_of_float64(told: Any, check: str) -> None:
    assert told["checks"][check] == ""


def test_torch_npu_and_mindspeed_make_no_library_print_more(told: Any) -> None:
    assert told["checks"]["quiet"] == ""


def test_a_policy_in_bf16_has_no_parameter_in_float32(told: Any) -> None:
    assert told["checks"]["one_dtype"] == ""


def test_a_resumed_policy_trains_on_as_if_it_had_stayed(told: Any) -> None:
    """MindSpeed's optimizer loads no states in the format of the checkpoints."""
    assert told["resumed"] == []


def test_deterministic_mode_is_torchs_and_that_of_hccl_and_cann(told: Any) -> None:
    assert told["checks"]["deterministic_mode"] == ""
