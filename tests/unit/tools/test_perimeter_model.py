"""The policy of `make quickstart-vl`: its problems, its demonstrations, its folder."""

from dataclasses import replace
from itertools import product
from random import Random

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from dapo_mcore.prompts import build_prompts, load_image_tokens
from dapo_mcore.reward.exact_match import verify
from dapo_mcore.train import load_config
from tools import make_perimeter_model
from tools.tiny.model import random_model
from tools.tiny.perimeters import CELL, LABEL_TOKENS, TOKENS, bare, draw, problem_sets, worked
from tools.tiny.sight import build_processor
from tools.tiny.sighted_warm_start import (
    DIGITS,
    WarmStart,
    answer_loss,
    demonstrations,
    descent,
    encoded,
    learning_rate,
    sight_loss,
    train,
)

MOST = (9, 9, 9)  # its worked answer is the longest
MADE = {"seed": 3, "warm": WarmStart(tower_steps=1, steps=2, batch_size=4), "training": 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Made by a warm start of a few steps."""
    folder = tmp_path_factory.mktemp("policy")
    make_perimeter_model.make(folder, **MADE)
    return folder


@pytest.fixture(scope="module")
def processor():
    processor = build_processor()
    processor.chat_template = make_perimeter_model.TEMPLATE
    return processor


@pytest.fixture(scope="module")
def config(folder):
    files = {f"data.{part}.files": f"[{folder / f'{part}.parquet'}]" for part in ("train", "val")}
    options = {"model.path": folder, **files}
    return load_config(["experiment=quickstart_vl", *(f"{name}={value}" for name, value in options.items())])


@pytest.fixture(scope="module")
def prompts(folder, config):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vision = load_image_tokens(str(folder), tokenizer, config.data.max_pixels)
    return {
        name: build_prompts(source, config.data, tokenizer, name, vision=vision).prompts
        for name, source in (("train", config.data.train), ("val", config.data.val))
    }


def test_a_worked_answer_adds_side_by_side():
    assert worked((3, 5, 2)) == "3+5=8\n8+2=10\n10"


def test_worked_and_bare_answers_are_right_under_the_runs_verifier():
    for sides in product(range(1, 10), repeat=3):
        answer = str(sum(sides))
        assert verify(worked(sides), answer, {}).accuracy == verify(bare(sides), answer, {}).accuracy == 1.0


@pytest.mark.parametrize("seed", [0, 1])
def test_the_sets_of_a_run_share_no_problem_and_validation_is_the_same_for_all_runs(seed):
    sets = problem_sets(seed, validation=160, training=160)
    drawn = [*sets.validation, *sets.training, *sets.warm_start]
    assert len(drawn) == len(set(drawn)) == 9**3
    assert sets.validation == problem_sets(7, 160, 160).validation
    assert sets.training != problem_sets(7, 160, 160).training


@pytest.mark.parametrize("side", range(3))
def test_the_length_of_a_side_is_seen_in_one_visual_token_alone(side):
    before = np.asarray(draw((1, 1, 1), Random(0)))
    after = np.asarray(draw(tuple(8 if other == side else 1 for other in range(3)), Random(0)))
    rows, columns = np.nonzero((before != after).any(-1))
    assert set(zip(rows // CELL, columns // CELL, strict=True)) == {divmod(LABEL_TOKENS[side], 3)}


def test_drawings_of_one_problem_differ_in_more_than_their_ink():
    shapes = {(np.asarray(draw(MOST, Random(seed))) < 255).any(-1).tobytes() for seed in range(4)}
    assert len(shapes) == 4


def test_a_run_asks_what_the_warm_start_was_asked(prompts, processor):
    asked = encoded(processor, [(MOST, "")], Random(0))["input_ids"][0].tolist()
    assert len(prompts["train"]) == 4 * 20
    assert len(prompts["val"]) == 160
    for prompt in (prompts["train"][0], prompts["val"][-1]):
        assert [*prompt.expanded_ids, asked[-1]] == asked  # and the end of an empty response


def test_pictures_and_answers_of_the_files_belong_together(prompts):
    """The pixels of each problem are those of the sides that were drawn for it."""
    rng = Random("validation")
    for sides, prompt in zip(problem_sets(3, 160, 20).validation[:20], prompts["val"], strict=False):
        assert prompt.answer == str(sum(sides))
        assert np.array_equal(np.asarray(prompt.images[0].decode()), np.asarray(draw(sides, rng)))


def test_the_longest_worked_answer_is_not_punished_for_its_length(folder, config):
    ids = AutoTokenizer.from_pretrained(folder)(worked(MOST)).input_ids
    assert len(ids) + 1 <= config.data.max_response_length - config.reward.overlong_buffer.len


def test_the_loss_is_the_mean_over_the_response_and_its_end(folder, processor):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    loss = answer_loss(model, processor, [((1, 2, 7), "10"), (MOST, worked(MOST))], Random(5))
    rng, total, count = Random(5), 0.0, 0
    for shown, length in (((1, 2, 7), "10"), 3), ((MOST, worked(MOST)), len(worked(MOST)) + 1):
        inputs = encoded(processor, [shown], rng)
        ids = inputs["input_ids"][0, -length:]
        logprobs = model(**inputs).logits[0, -length - 1 : -1].log_softmax(-1)
        total -= logprobs[torch.arange(length), ids].sum().item()
        count += length
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_the_tower_is_asked_for_the_digit_of_every_label_and_the_place_of_every_token(folder, processor):
    visual = AutoModelForImageTextToText.from_pretrained(folder).model.visual
    probe = torch.nn.Linear(64, DIGITS + TOKENS)
    problems = [(1, 2, 7), MOST]
    loss = sight_loss(torch.nn.ModuleList([visual, probe]), processor.image_processor, problems, Random(5))
    rng, digit_loss, place_loss = Random(5), 0.0, 0.0
    for sides in problems:
        seen = processor.image_processor([draw(sides, rng)], return_tensors="pt")
        scores = probe(visual(seen["pixel_values"], grid_thw=seen["image_grid_thw"]).pooler_output)
        for token, score in enumerate(scores):
            place_loss -= score[DIGITS:].log_softmax(-1)[token].item() / (2 * 6)
        for token, digit in zip((0, 2, 4), sides, strict=True):  # left, right, below
            digit_loss -= scores[token, :DIGITS].log_softmax(-1)[digit].item() / (2 * 3)
    assert loss.item() == pytest.approx(digit_loss + place_loss, rel=1e-5)


def test_before_the_policy_answers_its_tower_alone_learns(processor):
    model = random_model(make_perimeter_model.policy_config(), 0)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    recipe = WarmStart(tower_steps=1, steps=0, batch_size=4)
    train(model, processor, problem_sets(0, 160, 160).warm_start, recipe, 0, lambda step, loss: None)
    changed = [name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])]
    assert changed
    assert all(name.startswith("model.visual.") for name in changed)


def test_demonstrations_are_all_worked_first_and_mostly_bare_at_the_end():
    recipe = replace(WarmStart(), steps=100, batch_size=400, worked_only=0.8, worked_share=0.3)
    problems = problem_sets(0, 160, 160).warm_start

    def share(step):
        return sum("=" in response for _, response in demonstrations(problems, step, recipe, Random(step))) / 400

    assert share(0) == share(79) == 1.0
    assert 0.2 < share(80) < 0.4  # standard deviation 0.023


def test_the_learning_rate_rises_then_falls_to_its_least():
    recipe = replace(WarmStart(), lr=1e-3, min_lr=1e-4, lr_warmup_steps=10)
    rates = [learning_rate(recipe, step, 100) for step in range(100)]
    assert rates[0] == 1e-4
    assert max(rates) == rates[9] == pytest.approx(1e-3 - 9 * 9e-6)
    assert rates[50] == pytest.approx(5.5e-4)
    assert rates[99] == pytest.approx(1e-4, rel=0.1)


def test_every_step_has_the_gradient_of_its_own_loss_cut_to_its_limit():
    layer, slopes = torch.nn.Linear(1, 1, bias=False), (100.0, -0.5)
    losses = descent(layer, lambda step: slopes[step] * layer.weight.sum(), replace(WarmStart(), max_norm=1.0), 2)
    assert [layer.weight.grad.item() for _ in losses] == pytest.approx([1.0, -0.5])


def test_a_policy_follows_from_its_seed(folder, tmp_path, capsys):
    make_perimeter_model.make(tmp_path, **MADE)
    assert capsys.readouterr().out.startswith("warm start 3/3 loss ")  # the tower's step and two answers
    for name in ("model.safetensors", "train.parquet", "val.parquet"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
