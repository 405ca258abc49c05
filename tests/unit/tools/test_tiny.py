"""The tiny model, its problems and its demonstrations."""

import json
import random
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from reasoning_gym.utils import extract_answer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from dapo_mcore.weights.names import hf_shapes
from tools.make_tiny_model import is_finished, recipe_of
from tools.tiny import arithmetic, sight
from tools.tiny.arithmetic import ProblemSet, bare, training_set, unseen, warm_start_set, worked
from tools.tiny.model import FAMILIES, SEEING, random_model, save_folder, tiny_config
from tools.tiny.tokenizer import TOKENS, VOCAB_SIZE, build_tokenizer
from tools.tiny.warm_start import WarmStart, demonstrations, supervised_batch

QUICKSTART = Path(__file__).resolve().parents[3] / "configs" / "experiment" / "quickstart.yaml"
SUM = {"question": "State the final answer to the following arithmetic problem: 6 - 3 - 8 + 9 =",
       "answer": "4", "metadata": {"expression": "6 - 3 - 8 + 9"}}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_a_worked_answer_goes_term_by_term_through_negative_totals():
    assert worked(SUM) == "6 - 3 = 3; 3 - 8 = -5; -5 + 9 = 4; <answer>4</answer>"


def test_every_demonstration_ends_in_the_answer_of_the_generator():
    for problem in ProblemSet(seed=5, size=300).draw():
        assert extract_answer(worked(problem)) == extract_answer(bare(problem)) == problem["answer"]


def test_questions_and_demonstrations_survive_the_tokenizer(tokenizer):
    assert len(TOKENS) == 29
    for problem in [SUM, *ProblemSet(seed=5, size=300).draw()]:
        for text in (problem["question"], worked(problem), bare(problem)):
            ids = tokenizer(text).input_ids
            assert tokenizer.pad_token_id not in ids
            assert tokenizer.decode(ids) == text


def test_a_prompt_is_19_tokens_for_4_terms_and_21_for_5(tokenizer):
    lengths = {
        len(problem["metadata"]["expression"].split()): len(tokenizer(problem["question"]).input_ids)
        for problem in ProblemSet(seed=5, size=50).draw()
    }
    assert lengths == {7: 19, 9: 21}  # words of the expression: terms and signs


def test_unseen_problems_are_distinct_and_meet_no_other_set():
    others, problems = ProblemSet(seed=0, size=200).draw(), ProblemSet(seed=100, size=200).draw()
    left = unseen([*problems, problems[-1]], others)
    questions = {problem["question"] for problem in left}
    assert len(questions) == len(left)
    assert questions == {p["question"] for p in problems} - {p["question"] for p in others}
    assert len(left) < 101  # problems 100 to 199 are in both


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_sets_of_a_run_draw_from_different_seeds(seed):
    runs = [arithmetic.VALIDATION, *(make(s) for s in (seed, seed + 1) for make in (training_set, warm_start_set))]
    drawn = sorted((problems.seed, problems.seed + problems.size) for problems in runs)
    assert all(end <= start for (_, end), (start, _) in pairwise(drawn))


def test_the_quickstart_trains_and_validates_on_the_problems_the_warm_start_leaves_out():
    data = yaml.safe_load(QUICKSTART.read_text())["data"]
    for part, problems in ((data["train"], training_set(0)), (data["val"], arithmetic.VALIDATION)):
        assert (part["task"], part["task_options"]) == (arithmetic.TASK, arithmetic.OPTIONS)
        assert (part["seed"], part["size"]) == (problems.seed, problems.size)


def test_demonstrations_are_all_worked_first_and_mostly_bare_at_the_end():
    recipe = WarmStart(steps=100, batch_size=200)
    problems = ProblemSet(seed=5, size=400).draw()

    def share(step):
        pairs = demonstrations(problems, step, recipe, random.Random(step))
        return sum("=" in response for _, response in pairs) / len(pairs)

    assert share(0) == share(74) == 1.0
    assert 0.2 < share(75) < 0.4  # 0.3 of 200: standard deviation 0.03


def test_a_supervised_batch_trains_every_response_token_and_no_prompt_token(tokenizer):
    batch = supervised_batch([(SUM["question"], worked(SUM)), (SUM["question"], bare(SUM))], tokenizer)
    assert batch.prompt_lengths.tolist() == [19, 19]
    assert batch.num_loss_tokens == batch.response_lengths.sum() == len(batch.advantages)
    assert set(batch.advantages.tolist()) == {1.0}
    assert batch.old_logprobs is None
    _, second = batch.split(1)
    assert tokenizer.decode(second.token_ids[19:]) == "<answer>4</answer><eos>"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_the_folder_with_the_weights_that_were_saved(tmp_path, family, tied):
    model = random_model(tiny_config(family, tied), seed=3)
    save_folder(model, tmp_path)
    kind, size = (
        (AutoModelForImageTextToText, sight.VOCAB_SIZE) if family in SEEING else (AutoModelForCausalLM, VOCAB_SIZE)
    )
    # transformers turns experts that lie the wrong way round; the converter and vLLM do not.
    saved = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert saved == hf_shapes(model.config)
    loaded, report = kind.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.model_type == family
    assert loaded.config.get_text_config().vocab_size == size
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    made = sight.build_processor().tokenizer if family in SEEING else build_tokenizer()
    assert AutoTokenizer.from_pretrained(tmp_path).decode([14, 15]) == made.decode([14, 15])


def test_the_tokens_of_pictures_and_of_ends_are_those_of_the_tokenizer(tmp_path):
    model = random_model(tiny_config("qwen3_vl_moe"), seed=0)
    save_folder(model, tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert model.config.image_token_id == processor.image_token_id
    assert model.config.video_token_id == processor.video_token_id
    assert model.config.text_config.eos_token_id == processor.tokenizer.eos_token_id
    assert len(processor.tokenizer) <= model.config.text_config.vocab_size
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Wie groß ist $\\alpha$?"}]}]
    text = processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Wie")
    assert processor.tokenizer.decode(processor.tokenizer(text).input_ids) == text


def test_the_mixture_of_experts_has_one_matrix_per_expert_and_projection(tmp_path):
    from safetensors import safe_open

    save_folder(random_model(tiny_config("qwen3_moe"), seed=0), tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        matches = [re.fullmatch(r"model\.layers\.\d\.mlp\.experts\.(\d)\.(\w+)_proj\.weight", n) for n in file.keys()]  # noqa: SIM118
        sizes = [file.get_slice(n).get_shape() for n in file.keys()]  # noqa: SIM118
    assert sum(match is not None for match in matches) == 2 * 8 * 3
    assert sum(torch.Size(size).numel() for size in sizes) == 251_328


def test_the_weights_follow_from_the_seed():
    first, again, other = (random_model(tiny_config("llama"), seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_an_unknown_family_is_refused_by_name():
    with pytest.raises(ValueError, match=r"family=gpt2: not known; take one of llama, "):
        tiny_config("gpt2")


@pytest.mark.parametrize("change", [{"seed": 1}, {"tied": True}, {"warm": WarmStart(lr=1e-3)}, {"warm": None}])
def test_a_model_is_reused_for_the_same_recipe_only(tmp_path, change):
    asked = {"family": "qwen3_moe", "tied": False, "seed": 0, "warm": WarmStart()}
    assert not is_finished(tmp_path, recipe_of(**asked))
    (tmp_path / "recipe.json").write_text(json.dumps(recipe_of(**asked)))
    assert is_finished(tmp_path, recipe_of(**asked))
    assert not is_finished(tmp_path, recipe_of(**(asked | change)))
