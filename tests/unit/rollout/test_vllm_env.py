"""What surrounds an engine in its process; nothing here imports vLLM."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from dapo_mcore.rollout.ranks import Ranks, RolloutError
from dapo_mcore.rollout.rng import undisturbed_rng
from dapo_mcore.rollout.vllm_engine import end_of_sequence
from dapo_mcore.rollout.vllm_env import prepare_environment


class Tokenizer:
    eos_token_id: int | None

    def __init__(self, eos: int | None) -> None:
        self.eos_token_id = eos

    def decode(self, token_ids: object, *, skip_special_tokens: bool) -> str:
        return ""


def test_the_environment_of_the_user_stays_but_for_the_engine_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PATH": "/bin"}
    monkeypatch.setattr("os.environ", environment)
    prepare_environment()
    assert environment == {
        "PATH": "/bin",
        "VLLM_LOGGING_LEVEL": "DEBUG",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }


def test_random_numbers_go_on_as_if_nothing_had_been_drawn_in_between() -> None:
    def draw() -> tuple[list[float], float, float]:
        return torch.rand(3).tolist(), float(np.random.rand()), random.random()

    def seed(value: int) -> None:
        torch.manual_seed(value)
        np.random.seed(value)
        random.seed(value)

    seed(1)
    expected = [draw(), draw()]
    seed(1)
    first = draw()
    with undisturbed_rng():
        seed(2)
        draw()
    assert [first, draw()] == expected


@pytest.mark.parametrize(
    ("tokenizer", "config", "generation", "expected"),
    [
        (7, {"eos_token_id": 2}, {"eos_token_id": [2, 5]}, {2, 5, 7}),
        (None, {"eos_token_id": 0}, None, {0}),
        (7, {}, {"eos_token_id": None}, {7}),
        (None, {}, None, set()),
    ],
)
def test_a_response_ends_at_every_end_token_of_tokenizer_and_model(
    tokenizer: int | None, config: dict, generation: dict | None, expected: set[int], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert end_of_sequence(tmp_path, Tokenizer(tokenizer)) == expected


def test_a_single_process_needs_no_process_group() -> None:
    ranks = Ranks.world()
    assert (ranks.scatter(["share"]), ranks.gather("answer"), ranks.all_gather("news")) == (
        "share",
        ["answer"],
        ["news"],
    )
    assert ranks.together(lambda: 3) == 3
    with pytest.raises(RolloutError, match=r"^rank 0: ZeroDivisionError: "):
        ranks.together(lambda: 1 / 0)
