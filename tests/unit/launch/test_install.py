"""The installation: what is pinned, what is refused, when nothing is to be done."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from launch import install
from launch.install import LOCKS, ROOT, TORCH_LOCK, check_disk, check_machine, fingerprint, pinned


def versions(*locks):
    lines = [line.partition("==") for lock in locks for line in pinned(lock)]
    return {canonicalize_name(name): version for name, _, version in lines}


@pytest.mark.parametrize("lock", [TORCH_LOCK, *LOCKS.values()], ids=lambda lock: lock.name)
def test_every_package_is_pinned_to_one_version(lock):
    assert [line for line in pinned(lock) if not re.fullmatch(r"[\w.-]+==[\w.+]+", line)] == []
    assert len(versions(lock)) == len(pinned(lock))


def test_no_package_is_in_two_lock_files():
    parts = [set(versions(lock)) for lock in (TORCH_LOCK, *LOCKS.values())]
    assert sum(map(len, parts)) == len(set.union(*parts))


def test_torch_is_the_cpu_build_and_comes_with_nothing_that_does_not_import_beside_it():
    locked = versions(TORCH_LOCK, *LOCKS.values())
    assert locked["torch"].endswith("+cpu")
    assert locked["torchvision"] == "0.16.2"
    assert not locked.keys() & {"torchaudio", "torchcodec"}
    assert not [name for name in locked if name.startswith("nvidia")]


def test_the_locks_hold_everything_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    locked = versions(TORCH_LOCK, *LOCKS.values())
    for wanted in map(Requirement, [*project["dependencies"], *extras["cpu"], *extras["dev"]]):
        assert wanted.specifier.contains(locked[canonicalize_name(wanted.name)]), wanted


def test_another_version_in_the_lock_calls_for_another_installation(tmp_path, monkeypatch):
    lock = tmp_path / "cpu.lock"
    monkeypatch.setitem(LOCKS, "cpu", lock)
    marks = []
    for content in ("a==1\n", "a==2\n", "a==1\n"):
        lock.write_text(content)
        marks.append(fingerprint("cpu"))
    assert marks[0] == marks[2] != marks[1]


def test_an_installation_that_is_current_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(install, "VENV", tmp_path)
    monkeypatch.setattr(install, "PYTHON", tmp_path / "python")
    (tmp_path / "python").touch()
    assert not install.is_current("cpu")
    (tmp_path / "installed-cpu").write_text(fingerprint("cpu"))
    assert install.install() is False


def test_too_little_room_on_the_disk_is_told_with_the_folder_and_the_amounts(tmp_path):
    check_disk(tmp_path, needed_gb=0.0)
    with pytest.raises(ValueError, match=rf"{tmp_path}: [\d.]+ GB free, about 1000000 GB are needed; free some"):
        check_disk(tmp_path, needed_gb=1e6)


def test_another_python_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(install.sys, "version_info", (3, 9, 2))
    with pytest.raises(ValueError, match=r"locked for Python 3\.11; install python3\.11 .*make PYTHON="):
        check_machine()
