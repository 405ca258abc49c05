import json
import subprocess
import sys

import pytest

from dapo_mcore.config_check import check
from dapo_mcore.train import load_config, main

MOE = {"model_type": "qwen3_moe", "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8,
       "num_hidden_layers": 4, "moe_intermediate_size": 24, "max_position_embeddings": 256}  # fmt: skip
DENSE = {"model_type": "llama", "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 256}


@pytest.fixture
def models(tmp_path):
    for name, config in (("moe", MOE), ("dense", DENSE)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    return tmp_path


def load(models, *overrides, model="moe"):
    return load_config(["experiment=quickstart", f"model.path={models / model}", *overrides])


def test_the_quickstart_composes_and_passes_the_check(models):
    config = load(models)
    check(config, world_size=2)
    assert config.actor.clip_ratio_high == 0.28
    assert config.data.train_batch_size == 32


# override, what the message names
UNREADABLE = [
    ("actor.clip_ratio_hi=0.3", "did you mean actor.clip_ratio_high"),
    ("actor.clip_ratio_high=large", "clip_ratio_high.*'large'.*Float"),
    ("actor.old_logprobs=guess", "old_logprobs.*auto, recompute, rollout"),
    ("experiment=quickstrat", "experiment/quickstrat.*quickstart"),
    ("actor", "expected name=value"),
    ("+actor.new=1", "no such option"),
]


@pytest.mark.parametrize(("override", "message"), UNREADABLE)
def test_unknown_names_and_wrong_types_are_refused_by_name(models, override, message):
    with pytest.raises(ValueError, match=message):
        load(models, override)


def test_a_missing_value_is_named():
    with pytest.raises(ValueError, match=r"model\.path.*trainer|model\.path"):
        load_config(["trainer.total_training_steps=1"])


# overrides, processes, model, what the message names
CONTRADICTIONS = [
    ("rollout.n=1", 2, "moe", "rollout.n=1.*group.*at least 2"),
    ("actor.ppo_mini_batch_size=64", 2, "moe", "ppo_mini_batch_size=64.*train_batch_size=32"),
    ("actor.ppo_mini_batch_size=5", 2, "moe", "ppo_mini_batch_size=5.*divide"),
    ("rollout.top_p=0.9", 2, "moe", "rollout.top_p=0.9"),
    ("rollout.temperature=0", 2, "moe", "rollout.temperature"),
    ("reward.overlong_buffer.len=100", 2, "moe", "overlong_buffer.len=100.*60"),
    ("actor.clip_ratio_c=0.5", 2, "moe", "clip_ratio_c=0.5"),
    ("actor.optim.lr_decay_style=step", 2, "moe", "lr_decay_style=step.*cosine"),
    ("actor.megatron.expert_model_parallel_size=3", 3, "moe", "expert_model_parallel_size=3.*8 experts"),
    ("actor.megatron.expert_model_parallel_size=2", 3, "moe", "expert_model_parallel_size=2.*3 processes"),
    ("actor.megatron.expert_model_parallel_size=2", 2, "dense", "llama has no experts"),
    ("actor.megatron.tensor_model_parallel_size=2", 2, "moe", "sequence_parallel.*set it to true"),
    ("actor.megatron.expert_tensor_parallel_size=5", 10, "moe", "expert_tensor_parallel_size=5.*moe_intermediate_size"),
    ("actor.megatron.pipeline_model_parallel_size=0", 2, "moe", "pipeline_model_parallel_size=0.*above 0"),
    ("actor.megatron.pipeline_model_parallel_size=3", 6, "moe", "pipeline_model_parallel_size=3.*4 layers.*1, 2, 4"),
    ("actor.megatron.pipeline_model_parallel_size=2", 3, "moe", "pipeline_model_parallel_size=2.*3 processes"),
    ("actor.megatron.context_parallel_size=2", 3, "moe", "context_parallel_size=2.*3 processes.*multiple of 2"),
    ("actor.megatron.virtual_pipeline_model_parallel_size=2", 2, "moe", "virtual.*=2.*raise pipeline_model_parallel"),
    ("actor.megatron.overlap_param_gather=true", 2, "moe", "overlap_param_gather.*overlap_grad_reduce.*set both"),
    ("rollout.tensor_model_parallel_size=4", 2, "moe", "rollout.tensor_model_parallel_size=4.*2 processes"),
    ("data.max_response_length=300", 2, "moe", "max_position_embeddings 256"),
    ("data.train.files=[nowhere.jsonl]", 2, "moe", "data.train.files.*exactly one"),
    ("trainer.resume_mode=resume_path", 2, "moe", "resume_from_path"),
    ("actor.moe.router_replay=true", 2, "dense", "router_replay=True.*llama has no experts"),
    ("actor.moe.seq_aux_loss_coeff=1e-3", 2, "dense", "seq_aux_loss_coeff=0.001.*llama has no experts"),
    ("actor.moe.z_loss_coeff=-1e-3", 2, "moe", "z_loss_coeff=-0.001.*0 or more"),
    ("data.train_batch_size=0", 2, "moe", "data.train_batch_size=0.*above 0"),
]


@pytest.mark.parametrize(("override", "processes", "model", "message"), CONTRADICTIONS)
def test_contradicting_values_are_refused_with_the_way_out(models, override, processes, model, message):
    with pytest.raises(ValueError, match=message):
        check(load(models, override, model=model), processes)


def test_chunks_of_all_stages_must_divide_the_layers(models):
    overrides = [f"actor.megatron.{x}pipeline_model_parallel_size={n}" for x, n in (("", 2), ("virtual_", 3))]
    with pytest.raises(ValueError, match=r"virtual_pipeline_model_parallel_size=3.*4 layers.*\[1, 2\]"):
        check(load(models, *overrides), world_size=4)


def test_experts_of_every_pipeline_stage_need_processes(models):
    overrides = ["actor.megatron.pipeline_model_parallel_size=2", "actor.megatron.expert_model_parallel_size=4"]
    with pytest.raises(ValueError, match=r"expert_model_parallel_size=4.*pipeline.*=2.*4 processes.*multiple of 8"):
        check(load(models, *overrides), world_size=4)


@pytest.mark.parametrize("option", ["actor.megatron", "rollout"])
def test_tensor_parallelism_must_divide_the_heads(models, option):
    overrides = [f"{option}.tensor_model_parallel_size=2", "actor.megatron.expert_model_parallel_size=1"]
    with pytest.raises(ValueError, match=rf"{option}.*=2.*9 attention heads.*\[1, 3, 9\]"):
        check(load(models, *overrides, model="dense"), world_size=2)


@pytest.mark.parametrize("content", [None, "not json"])
def test_a_model_folder_without_a_readable_config_is_refused(tmp_path, content):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.path=.*config\.json"):
        check(load_config(["experiment=quickstart", f"model.path={tmp_path}"]), world_size=2)


def test_a_refused_run_prints_one_line_on_rank_0_only_and_fails(models, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("dapo_mcore.train.LEADER_SPEAKS_S", 0.0)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert main(["experiment=quickstart", f"model.path={models / 'moe'}", "rollout.n=1"]) != 0
    told = capsys.readouterr().err
    assert told.count("error:") == 1
    assert told.count("\n") == 1


def test_options_are_read_and_checked_without_importing_torch():
    program = "import sys, dapo_mcore.train as t; t.main(['rollout.m=1']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0
