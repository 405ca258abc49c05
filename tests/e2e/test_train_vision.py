"""The whole program on rows with pictures: two processes that share the experts, router replay, resume, export."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import torch
import transformers
from PIL import Image

from tests.e2e.torchrun import errors, rows, train
from tools.tiny.model import random_model, save_folder, tiny_config

STEPS = 3
SIZES = [(64, 64), (70, 130), (96, 64), (200, 96)]
OPTIONS = (
    "data.train.task=''",
    "data.train.size=-1",
    "data.val.task=''",
    "data.val.size=-1",
    "data.apply_chat_template=true",
    "data.max_prompt_length=128",
    "actor.ppo_max_token_len_per_gpu=512",
    "actor.moe.router_replay=true",
    "weights.attest=full",
    f"trainer.total_training_steps={STEPS}",
    f"trainer.max_ckpt_to_keep={STEPS}",
)


def write_rows(file: Path, count: int) -> Path:
    """In turn without a picture, with one and with two."""
    lines = []
    for number in range(count):
        names = [f"{file.stem}{number}-{i}.png" for i in range(number % 3)]
        for name, size in zip(names, SIZES[number % 2 :], strict=False):
            noise = Random(name).randbytes(3 * size[0] * size[1])
            Image.frombytes("RGB", size, noise).save(file.parent / name)
        question = "".join(f"<image>{letter} " for letter in "ab"[: len(names)]) + f"Find {number}."
        lines.append(json.dumps({"prompt": question, "answer": "1", "images": names}))
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_folder(random_model(tiny_config("qwen3_vl_moe"), seed=0), folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    sources = {"train": write_rows(folder / "train.jsonl", 30), "val": write_rows(folder / "val.jsonl", 6)}
    return [*OPTIONS, *(f"data.{name}.files=[{file}]" for name, file in sources.items())]


@pytest.fixture(scope="module")
def run(model, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    result = train(model, out, *data)
    assert result.returncode == 0, result.stderr
    return out


def test_engine_and_trainer_agree_on_every_token_of_a_run_with_pictures(run):
    metrics = rows(run)
    assert list(metrics) == [0, 1, 2, 3]
    trained = [metrics[step] for step in (1, 2, 3)]
    assert all(row["actor/mismatch_max"] < 2e-5 for row in trained), "nats"
    assert all(row["weights/probe_gap"] < 2e-5 for row in metrics.values())
    # every choice of an expert was replayed (else the run ends), and none but that of a response's last token is new
    assert all(row["moe/replay_changed_fraction"] < 0.05 for row in trained)
    assert all(row["actor/grad_norm"] > 0 for row in trained)


def test_a_resumed_run_has_the_metrics_of_the_uninterrupted_one(model, data, run, tmp_path):
    first = run / "checkpoints" / "step_000001"
    resumed = train(model, tmp_path, *data, "trainer.resume_mode=resume_path", f"trainer.resume_from_path={first}")
    assert resumed.returncode == 0, resumed.stderr
    assert rows(tmp_path) == {step: row for step, row in rows(run).items() if step > 1}


def test_transformers_loads_the_trained_policy_whose_tower_is_as_it_was(model, run):
    before, after = (
        transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (model, run / "hf_model")
    )
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(".visual." in name for name in moved)
    assert {"lm_head.weight", "model.language_model.layers.0.mlp.experts.gate_up_proj"} <= moved
    processors = [transformers.AutoProcessor.from_pretrained(folder) for folder in (model, run / "hf_model")]
    assert processors[0].to_dict() == processors[1].to_dict()


def test_a_broken_picture_ends_the_run_before_it_begins_with_one_error_that_names_its_row(model, data, tmp_path):
    file = write_rows(tmp_path / "broken.jsonl", 6)
    picture = tmp_path / "broken4-0.png"
    picture.write_bytes(picture.read_bytes()[:300])
    result = train(model, tmp_path / "out", *data, f"data.train.files=[{file}]")
    assert result.returncode != 0
    assert len(errors(result)) == 1, result.stderr
    assert f"{file}: row 5: a picture that breaks off or is damaged" in result.stderr
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
