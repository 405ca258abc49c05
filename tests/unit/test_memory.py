"""Memory of a run: figures worked out on paper for the target model, and what Megatron allocates for small ones."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dapo_mcore.config import RunConfig
from dapo_mcore.memory import Footprint, elements, footprint, table
from dapo_mcore.train import load_config
from dapo_mcore.weights.placement import TrainLayout
from tests.tiny_vl import tiny_vl
from tools.plan import main, read_model
from tools.tiny.model import tiny_config

EP8 = "dapo_qwen3_vl_30b_geo3k"
TRAINED = "actor.vision.train=all"


def recipe(*overrides: str, name: str = EP8) -> RunConfig:
    return load_config([f"experiment={name}", *overrides])


def of_the_target(*overrides: str) -> Footprint:
    return footprint(recipe(*overrides), read_model("Qwen3-VL-30B-A3B"), 8)


def gb(found: Footprint, turn: str, *names: str) -> float:
    assert set(names) <= {part.name for part in found.parts}
    return sum(getattr(part, turn) for part in found.parts if part.name in names) / 1e9


def as_printed(figure: float) -> Any:
    return pytest.approx(figure, abs=0.051)


def test_the_target_model_takes_what_was_worked_out_on_paper():
    """EP8 on 8 devices, everything trained: 3.62 billion numbers in experts and 2.08 billion others on each."""
    found = of_the_target(TRAINED)
    assert gb(found, "train", "weights", "vision tower") == as_printed(11.4)
    assert gb(found, "train", "gradients") == as_printed(22.8)
    assert gb(found, "train", "optimizer") == as_printed(43.5 + 3.1)
    assert gb(found, "train", "weights", "vision tower", "gradients", "optimizer") == pytest.approx(81, abs=0.5)
    assert 8 * gb(found, "host", "optimizer") == pytest.approx(373, abs=0.5)


MERGERS = 4 * (4608 * 4608 + 4608 + 2048 * 4608 + 2048) + 2 * (1152 + 3 * 4608)  # two layers and a norm each


@pytest.mark.parametrize(("trained", "numbers"), [("all", 538_631_408), ("mergers", MERGERS)])
def test_gradients_and_optimizer_of_a_tower_are_those_of_what_is_trained_of_it(trained, numbers):
    frozen, found = of_the_target(), of_the_target(f"actor.vision.train={trained}")
    assert gb(frozen, "train", "vision tower") == gb(found, "train", "vision tower") == 538_631_408 * 2 / 1e9
    assert gb(found, "train", "gradients") - gb(frozen, "train", "gradients") == pytest.approx(numbers * 4 / 1e9)
    assert gb(found, "train", "optimizer") - gb(frozen, "train", "optimizer") == pytest.approx(numbers * 12 / 8 / 1e9)


def test_full_recomputation_keeps_the_inputs_of_all_layers():
    """197 kB per token: 48 layers of width 2,048 in two bytes."""
    one, other = (read_model("Qwen3-VL-30B-A3B") for _ in range(2))
    other.text_config.num_hidden_layers = 96
    fewer, more = (gb(footprint(recipe(), hf, 8), "train", "activations") for hf in (one, other))
    assert (more - fewer) / recipe().actor.ppo_max_token_len_per_gpu == pytest.approx(197e-6, abs=0.5e-6)


@pytest.mark.parametrize(
    ("size", "expert_parallel", "held"), [(8, "true", 7.68), (4, "true", 15.3), (1, "false", 61.1)]
)
def test_an_engine_s_weights_are_those_of_the_plan_of_a_push(size, expert_parallel, held):
    """As in the table of tests/unit/tools/test_plan.py."""
    options = (f"rollout.tensor_model_parallel_size={size}", f"rollout.enable_expert_parallel={expert_parallel}")
    assert gb(of_the_target(*options), "sample", "engine's weights") == as_printed(held)


def test_the_kv_cache_holds_256_responses_of_full_length():
    """98,304 bytes per token for all 4 heads, of which each of 4 devices has one."""
    assert of_the_target().kv_tokens == (18432 << 20) // (98_304 // 4) == 256 * 3072


def test_offloaded_parts_lie_on_the_host_while_the_engine_samples():
    away, here = of_the_target(), of_the_target(*(f"actor.megatron.{x}_offload=false" for x in ("param", "optimizer")))
    assert gb(away, "sample", "weights", "vision tower", "gradients", "optimizer") == 0
    assert gb(away, "host", "weights", "vision tower", "optimizer") == gb(
        here, "sample", "weights", "vision tower", "optimizer"
    )
    assert here.total.host == 0
    assert away.total.train == here.total.train
    gone = gb(away, "train", "gradients", "optimizer")
    assert gb(here, "push", "gradients") == gb(away, "push", "gradients", "optimizer") == 0
    assert (here.total.push - away.total.push) / 1e9 == pytest.approx(gb(here, "train", "optimizer"))
    assert gone > 60


def test_gradients_are_not_kept_on_the_host():
    assert gb(of_the_target(), "host", "gradients") == 0


def test_a_reference_model_is_a_second_policy_without_gradients():
    kl = ("actor.use_kl_loss=true", "actor.kl_loss_coef=0.001")
    found = of_the_target(*kl)
    assert gb(found, "train", "reference") == gb(found, "train", "weights", "vision tower")
    assert gb(of_the_target(*kl, "ref.param_offload=true"), "sample", "reference") == 0


def test_engines_in_ray_have_devices_of_their_own():
    options = (f"actor.megatron.{part}_offload=false" for part in ("param", "grad", "optimizer"))
    found = of_the_target("rollout.backend=ray", *options)
    assert gb(found, "push", "engine's weights", "KV cache", "bucket of a push") == 0
    assert gb(found, "sample", "weights", "gradients", "optimizer") == 0
    assert gb(found, "sample", "engine's weights", "KV cache") > 30


def test_a_push_stages_no_more_than_an_engine_holds():
    config, hf = small({}), tiny_config("llama")
    large, tiny = of_the_target(), footprint(config, hf, 1)
    assert gb(large, "push", "bucket of a push") * 1e9 == 256 << 20
    assert gb(tiny, "push", "bucket of a push") == 2 * gb(tiny, "push", "engine's weights")
    seeing = footprint(config, tiny_vl("qwen3_vl").config, 1)
    both = gb(seeing, "push", "engine's weights", "engine's vision tower")
    assert gb(seeing, "push", "bucket of a push") == pytest.approx(2 * both)


def test_a_micro_batch_grows_to_the_longest_sequence():
    budgets = ("actor.ppo_max_token_len_per_gpu=1024", "actor.ppo_max_token_len_per_gpu=3072")
    short, long = (gb(of_the_target(option), "train", "activations") for option in budgets)
    assert short == long < gb(of_the_target(), "train", "activations")


def test_the_first_of_four_stages_has_four_micro_batches_under_way():
    """Each with a quarter of the layers: what is kept of them is that of the model on one stage."""
    options = ("actor.megatron.pipeline_model_parallel_size=4", "actor.megatron.expert_model_parallel_size=2")
    hf = read_model("Qwen3-30B-A3B")
    staged, whole = (footprint(recipe(*overrides), hf, 8) for overrides in (options, ()))
    assert gb(staged, "train", "activations") == gb(whole, "train", "activations")


TEXT_MODEL = "Qwen3-30B-A3B"
MEGATRON = "actor.megatron."
SHARED = [f"{MEGATRON}{x}" for x in ("tensor_model_parallel_size=2", "sequence_parallel=true",
                                     "expert_model_parallel_size=4")]  # fmt: skip
STAGES = [f"{MEGATRON}{x}" for x in ("pipeline_model_parallel_size=2", "expert_model_parallel_size=4")]
IN_LAYER = (
    4 * 2048 + (3 * 32 + 4 * 4) * 128 + 8 * (2 * 2048 + 3 * 768)
)  # norms, attention, 8 experts: numbers per token


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ((f"{MEGATRON}recompute=none",), IN_LAYER),
        ((f"{MEGATRON}recompute=none", *SHARED), IN_LAYER / 2),
        # An expert's input and output are whole on both ranks, and of the rest each has a half.
        ((f"{MEGATRON}recompute=none", f"{MEGATRON}expert_tensor_parallel_size=2", *SHARED), 53_248),
        ((f"{MEGATRON}recompute=full", *SHARED), 2048 / 2),
    ],
)
def test_what_a_layer_keeps_is_shared_by_tensor_parallel_ranks(options, numbers):
    one, other = (read_model(TEXT_MODEL) for _ in range(2))
    other.num_hidden_layers = 96
    config = recipe(*options)
    fewer, more = (gb(footprint(config, hf, 8), "train", "activations") * 1e9 for hf in (one, other))
    assert (more - fewer) / config.actor.ppo_max_token_len_per_gpu == pytest.approx(2 * 48 * numbers)


def test_context_parallel_ranks_share_the_longest_sequence():
    options = ("actor.ppo_max_token_len_per_gpu=1024", f"{MEGATRON}context_parallel_size=2")
    whole, shared = (footprint(recipe(*options[:n]), read_model(TEXT_MODEL), 8) for n in (1, 2))
    assert gb(whole, "train", "activations") == pytest.approx(2 * gb(shared, "train", "activations"))


def test_the_first_of_two_interleaved_stages_has_five_of_four_chunks_under_way():
    """Of two chunks with 12 layers each: 2 x (2 - 1) + (2 - 1) x 2 to warm up and one more, 1F1B."""
    config = recipe(*STAGES, f"{MEGATRON}virtual_pipeline_model_parallel_size=2")
    found = footprint(config, read_model(TEXT_MODEL), 8)
    tokens = config.actor.ppo_max_token_len_per_gpu
    assert gb(found, "train", "activations") * 1e9 == pytest.approx(2 * tokens * (5 * 12 * 2048 + IN_LAYER))


def test_the_last_stage_is_the_fullest_where_logits_weigh_more_than_what_is_under_way():
    short = ("actor.ppo_max_token_len_per_gpu=128", "data.max_prompt_length=64", "data.max_response_length=64")
    found = footprint(recipe(*STAGES, *short), read_model(TEXT_MODEL), 8)
    assert gb(found, "train", "logits") * 1e9 == pytest.approx(4 * 128 * 151_936)
    assert gb(found, "train", "activations") * 1e9 == pytest.approx(2 * 128 * (24 * 2048 + IN_LAYER))
    halves = footprint(recipe(*SHARED, *short), read_model(TEXT_MODEL), 8)
    assert gb(halves, "train", "logits") == gb(found, "train", "logits")  # half of the columns, and a second buffer


def test_heads_that_more_ranks_share_than_there_are_lie_on_each_of_them():
    assert of_the_target("rollout.tensor_model_parallel_size=8").kv_tokens == of_the_target().kv_tokens


# family, dtype, rank, ranks, layout; what Megatron allocates on that rank is compared
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
CASES = [
    ("qwen3_moe", "bf16", 0, 1, {}),
    ("qwen3_moe", "fp32", 0, 1, {}),
    ("qwen3_moe", "bf16", 0, 2, {"use_distributed_optimizer": False}),
    ("qwen3_moe", "bf16", 5, 8, {**TP2, "expert_model_parallel_size": 4}),
    ("qwen3_moe", "bf16", 0, 4, {**TP2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}),
    ("qwen3_vl_moe", "bf16", 0, 8, {"expert_model_parallel_size": 4, "context_parallel_size": 2}),
    ("llama", "bf16", 0, 4, {"pipeline_model_parallel_size": 2}),
]
LAST_STAGE_OF_A_TIED_MODEL = ("llama", "bf16", 3, 4, {"pipeline_model_parallel_size": 2})


@pytest.fixture(scope="module")
def allocated() -> list[dict[str, float]]:
    """By case, then that of the last stage, then bytes per token and layer by family and recomputation."""
    names = ("family", "dtype", "rank", "ranks", "megatron")
    cases = json.dumps([dict(zip(names, case, strict=True)) for case in (*CASES, LAST_STAGE_OF_A_TIED_MODEL)])
    program, root = [sys.executable, "-m", "tests.unit.megatron_sizes"], Path(__file__).parents[2]
    done = subprocess.run(program, input=cases, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: "-".join(map(str, CASES[number][:4])))
def test_small_models_take_what_megatron_allocates(allocated, number):
    family, dtype, _, ranks, megatron = CASES[number]
    hf = tiny_vl(family).config if "_vl" in family else tiny_config(family, tied=family == "llama")
    config = small(megatron, dtype)
    found, expected = footprint(config, hf, ranks), allocated[number]
    assert gb(found, "train", "weights") * 1e9 == expected["weights"]
    assert gb(found, "train", "vision tower") * 1e9 == expected["vision tower"]
    # Megatron pads what it divides over ranks.
    for name in ("gradients", "optimizer"):
        assert gb(found, "train", name) * 1e9 == pytest.approx(expected[name], rel=0.01)


def test_the_last_stage_has_a_tied_head_of_its_own(allocated):
    hf = tiny_config("llama", tied=True)
    held = elements(hf, TrainLayout(ranks=4, pp=2), rank=3, padded_vocab=hf.vocab_size)
    assert 2 * held.dense == allocated[-2]["weights"]


def small(megatron: dict[str, Any], dtype: str = "fp32") -> RunConfig:
    config = load_config(["model.path=none", "trainer.total_training_steps=1", f"model.dtype={dtype}"])
    return replace(config, actor=replace(config.actor, megatron=replace(config.actor.megatron, **megatron)))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_layers_of_small_models_keep_what_is_said_or_somewhat_more(allocated, family):
    """Exactly their inputs with full recomputation. Without any, a CPU's kernels, which are not fused, keep more."""
    config, two = small({}), tiny_config(family)
    one = tiny_config(family)
    one.num_hidden_layers = 1
    tokens = config.actor.ppo_max_token_len_per_gpu
    without = [gb(footprint(config, hf, 1), "train", "activations") * 1e9 / tokens for hf in (one, two)]
    assert allocated[-1][f"{family} full"] == 64 * 4
    assert 1 <= allocated[-1][f"{family} none"] / (without[1] - without[0]) < 2


def test_the_table_says_that_it_is_calculated_and_adds_up(capsys):
    assert main(["memory", "--model", "Qwen3-VL-30B-A3B", "--ranks", "8", f"experiment={EP8}"]) == 0
    head, *rows, note = capsys.readouterr().out.splitlines()
    assert head.split() == ["memory", "in", "GB,", "calculated", "train", "push", "sample", "host"]
    assert rows[-1].split() == ["in", "all", "85.0", "28.0", "35.7", "457.6"]
    assert "host of 8" in note
    assert "786,432 tokens" in note


def test_the_host_of_a_node_has_no_more_devices_than_there_are():
    found = of_the_target()
    assert table(found, 8, 8)[-2].split()[-1] == table(found, 8, 16)[-2].split()[-1] == "457.6"
    assert table(found, 16, 4)[-2].split()[-1] == "228.8"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--ranks 6 actor.megatron.expert_model_parallel_size=4", "expert_model_parallel_size=4"),
        ("--ranks 8 actor.megatron.expert_model_parallel_sise=4", "no such option; did you mean"),
    ],
)
def test_a_wrong_layout_or_option_is_refused_before_anything_is_calculated(options, told, capsys):
    assert main(["memory", "--model", "Qwen3-30B-A3B", *options.split(), f"experiment={EP8}"]) == 2
    assert told in capsys.readouterr().err
