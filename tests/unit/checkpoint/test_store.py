from __future__ import annotations

import pytest
import torch.distributed as dist

from dapo_mcore.actor import parallel
from dapo_mcore.checkpoint.store import CheckpointStore


@pytest.fixture(scope="module", autouse=True)
def world_of_one():
    parallel.init_process_group()
    yield
    dist.destroy_process_group()


class Steps:
    """A policy that is nothing but its step."""

    def __init__(self, step):
        self.step = step

    def state(self, loading):
        return {"step": self.step}

    def load_state(self, loaded):
        self.step = loaded["step"]


def saved(folder, *steps):
    """A store of two checkpoints, after these saves."""
    store = CheckpointStore(folder, keep=2)
    for step in steps:
        store.save(step, Steps(step), {"after": step})
    return store


def names(folder):
    return sorted(path.name for path in folder.glob("step_*"))


def loaded(store):
    policy = Steps(0)
    state = store.load(store.newest(print), policy)
    return policy.step, state["after"]


def test_the_newest_are_kept_and_found(tmp_path):
    store = saved(tmp_path, 20, 40, 60)
    assert names(tmp_path) == ["step_000040", "step_000060"]
    assert loaded(store) == (60, 60)


def test_a_run_started_anew_in_the_folder_of_a_longer_one_keeps_its_own(tmp_path):
    saved(tmp_path, 80, 100)
    store = saved(tmp_path, 20)
    assert "step_000020" in names(tmp_path)
    assert loaded(store) == (20, 20)
    store.save(40, Steps(40), {"after": 40})
    assert names(tmp_path) == ["step_000020", "step_000040"]


def test_a_run_does_not_fall_back_on_what_another_left(tmp_path):
    saved(tmp_path, 80, 100)
    store = saved(tmp_path, 20)
    (tmp_path / "step_000020" / "run.json").write_text("{}")
    reports = []
    assert store.newest(reports.append) is None
    assert "step_000020" in reports[0]


def test_without_latest_the_newest_is_that_of_the_last_step(tmp_path):
    store = saved(tmp_path, 20, 40)
    (tmp_path / "latest").unlink()
    assert loaded(store) == (40, 40)
