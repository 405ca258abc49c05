import json
import subprocess
import sys

import pytest

from dapo_mcore.config import MegatronConfig, RolloutConfig
from dapo_mcore.config_check import check
from dapo_mcore.layout_check import check_model_fits
from dapo_mcore.platform import platform
from dapo_mcore.train import load_config, main

MOE = {"model_type": "qwen3_moe", "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8,
       "num_hidden_layers": 4, "moe_intermediate_size": 24, "max_position_embeddings": 256}  # fmt: skip
DENSE = {"model_type": "llama", "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 256}
DECODER = {**MOE, "model_type": "qwen3_vl_moe_text", "rope_parameters": {"mrope_interleaved": True}}
VISION = {
    "model_type": "qwen3_vl_moe",
    "text_config": DECODER,
    "vision_config": {"deepstack_visual_indexes": [8, 16, 24]},
}
OTHER_VISION = {"model_type": "llava", "text_config": DENSE, "vision_config": {}}
IN_CHUNKS = VISION | {"text_config": DECODER | {"rope_parameters": {"mrope_section": [24, 20, 20]}}}
SAID_NO = VISION | {"text_config": DECODER | {"rope_parameters": {"mrope_interleaved": False}}}
MODELS = {"moe": MOE, "dense": DENSE, "vision": VISION, "llava": OTHER_VISION, "in chunks": IN_CHUNKS, "no": SAID_NO}


@pytest.fixture
def models(tmp_path):
    for name, config in MODELS.items():
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


def test_the_option_check_reads_the_decoder_of_a_vision_language_model(models):
    check(load(models, "actor.moe.router_replay=true", model="vision"), world_size=2)


def test_the_option_check_reads_rope_scaling_as_published_models_have_it(models):
    rope = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
    published = VISION | {"text_config": MOE | {"rope_scaling": rope}}
    (models / "vision" / "config.json").write_text(json.dumps(published))
    check(load(models, model="vision"), world_size=2)


def test_virtual_stages_that_split_the_layers_with_visual_features_are_refused(models):
    vision = VISION | {"vision_config": {"deepstack_visual_indexes": [8, 16]}}
    (models / "vision" / "config.json").write_text(json.dumps(vision))
    stages = [f"actor.megatron.{kind}pipeline_model_parallel_size=2" for kind in ("", "virtual_")]
    check(load(models, stages[0], model="vision"), world_size=4)
    with pytest.raises(ValueError, match=r"virtual_pipeline_model_parallel_size=2: leaves 1 layers.*the first 2"):
        check(load(models, *stages, model="vision"), world_size=4)


# override, what the message names
UNREADABLE = [
    ("actor.clip_ratio_hi=0.3", "did you mean actor.clip_ratio_high"),
    ("actor.clip_ratio_high=large", "clip_ratio_high.*'large'.*Float"),
    ("actor.old_logprobs=guess", "old_logprobs.*auto, recompute, rollout"),
    ("weights.push=always", "push.*always.*auto, direct, reload"),
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
    ("actor.optim.min_lr=1e-2", 2, "moe", "min_lr=0.01: above actor.optim.lr=0.0001.*lower it"),
    ("actor.optim.min_lr=-1", 2, "moe", "min_lr=-1.*0 or more"),
    ("actor.optim.beta2=1", 2, "moe", r"beta2=1.0.*\[0, 1\)"),
    ("actor.optim.lr=nan", 2, "moe", "actor.optim.lr=nan: is not a number"),
    ("rollout.temperature=nan", 2, "moe", "rollout.temperature=nan: is not a number"),
    ("rollout.val.top_k=-7", 2, "moe", "rollout.val.top_k=-7.*-1 for all"),
    ("rollout.max_num_batched_tokens=0", 2, "moe", "max_num_batched_tokens=0.*above 0"),
    ("rollout.max_num_batched_tokens=9", 2, "moe", "max_num_batched_tokens=9: below.*max_num_seqs=256.*raise it"),
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
    ("rollout.n_schedule=[{until:0.5,value:1}]", 2, "moe", "n_schedule=1.*at least 2"),
    ("rollout.temperature_schedule=[{until:0.5,value:1.2},{until:0.3,value:1.1}]", 2, "moe", "temperature_sch.*rising"),
    ("rollout.temperature_schedule=[{until:1.5,value:1.2}]", 2, "moe", r"until 1.5.*in \(0, 1\]"),
    ("actor.moe.router_replay=true", 2, "dense", "router_replay=True.*llama has no experts"),
    ("actor.moe.seq_aux_loss_coeff=1e-3", 2, "dense", "seq_aux_loss_coeff=0.001.*llama has no experts"),
    ("actor.vision.train=all", 2, "moe", "actor.vision.train=all.*has no vision tower.*leave it out"),
    ("actor.vision.split_images=true", 2, "moe", "actor.vision.split_images=True.*has no vision tower"),
    ("actor.moe.z_loss_coeff=-1e-3", 2, "moe", "z_loss_coeff=-0.001.*0 or more"),
    ("weights.bucket_mb=0", 2, "moe", "weights.bucket_mb=0.*above 0"),
    ("data.max_pixels=0", 2, "moe", "data.max_pixels=0.*above 0"),
    ("data.train_batch_size=0", 2, "moe", "data.train_batch_size=0.*above 0"),
    ("rollout.n=2", 2, "llava", "model.path=.*llava sees images.*qwen3_vl and qwen3_vl_moe"),
    ("rollout.n=2", 2, "in chunks", "model.path=.*does not say mrope_interleaved.*put .*true"),
    ("rollout.n=2", 2, "no", "model.path=.*does not say mrope_interleaved.*put .*true"),
    ("actor.megatron.pipeline_model_parallel_size=2", 4, "vision", "pipeline.*size=2: leaves 2 layers.*the first 3"),
    ("actor.megatron.expert_model_parallel_size=3", 3, "vision", "expert_model_parallel_size=3.*8 experts"),
    ("data.max_response_length=300", 2, "vision", "max_position_embeddings 256"),
]


@pytest.mark.parametrize(("override", "processes", "model", "message"), CONTRADICTIONS)
def test_contradicting_values_are_refused_with_the_way_out(models, override, processes, model, message):
    with pytest.raises(ValueError, match=message):
        check(load(models, override, model=model), processes)


# overrides, what the message names
CORRECTION = "actor.rollout_correction"
GSPO = ["actor.loss_mode=gspo", "actor.old_logprobs=auto"]
ALGORITHM = [
    (
        ["actor.kl_loss_coef=0.001"],
        r"actor\.kl_loss_coef=0\.001.*actor\.use_kl_loss=false.*set actor\.use_kl_loss=true",
    ),
    (["actor.use_kl_loss=true"], r"actor\.use_kl_loss=True.*actor\.kl_loss_coef=0.*set actor\.kl_loss_coef"),
    (["actor.kl_loss_coef=-1", "actor.use_kl_loss=true"], r"actor\.kl_loss_coef=-1.*0 or more"),
    (["algorithm.kl_ctrl.kl_coef=0.1"], r"kl_ctrl\.kl_coef=0\.1.*algorithm\.use_kl_in_reward=false"),
    (["algorithm.use_kl_in_reward=true"], r"use_kl_in_reward=True.*algorithm\.kl_ctrl\.kl_coef=0"),
    (
        ["algorithm.use_kl_in_reward=true", "algorithm.kl_ctrl.kl_coef=0.1", "algorithm.overlong_filtering=true"],
        r"use_kl_in_reward=True.*overlong_filtering=true",
    ),
    (["ref.param_offload=true"], r"ref\.param_offload=True.*no option needs a reference model"),
    ([*GSPO, f"{CORRECTION}.rollout_is=token"], r"rollout_is=token.*loss_mode=gspo.*sequence level"),
    ([*GSPO, f"{CORRECTION}.rollout_rs=token_k1"], r"rollout_rs=token_k1.*loss_mode=gspo"),
    ([f"{CORRECTION}.rollout_is=token", "actor.old_logprobs=rollout"], r"old_logprobs=rollout.*old_logprobs=auto"),
    ([f"{CORRECTION}.rollout_rs=seq_sum_k1", "actor.old_logprobs=rollout"], r"old_logprobs=rollout"),
    ([f"{CORRECTION}.rollout_is_threshold=0.5"], r"rollout_is_threshold=0\.5"),
    ([f"{CORRECTION}.rollout_rs_threshold_lower=1.5"], r"rollout_rs_threshold_lower=1\.5.*\[0, 1\]"),
    (["actor.loss_scale_factor=0"], r"loss_scale_factor=0.*above 0"),
    (["rollout.n=1", "algorithm.adv_estimator=rloo"], r"rollout\.n=1.*at least 2"),
]


# overrides, what the message names
FILTER = "algorithm.filter_groups"
SAMPLING = [
    (["data.gen_batch_size=3", f"{FILTER}.max_num_gen_batches=4"], r"max_num_gen_batches=4.*gen_batch_size=3.*=32"),
    ([f"{FILTER}.max_dynamic_samples=8"], r"max_dynamic_samples=8.*rollout\.n=8.*0 to switch off"),
    (
        [f"{FILTER}.max_dynamic_samples=16", "rollout.n_schedule=[{until:0.5,value:16}]"],
        r"max_dynamic_samples=16.*rollout\.n=16",
    ),
    ([f"{FILTER}.max_dynamic_samples=64", f"{FILTER}.enable=false"], r"max_dynamic_samples=64.*enable=false"),
    ([f"{FILTER}.on_exhausted=carry_over"], r"on_exhausted=carry_over.*staleness=0.*staleness=1"),
    (["rollout.staleness=1", "actor.old_logprobs=auto"], r"staleness=1.*earlier weights.*rollout_is=token"),
    (["rollout.staleness=1", "actor.moe.router_replay=true"], r"staleness=1.*router_replay=true"),
    (["rollout.staleness=-1"], r"rollout\.staleness=-1.*0 or more"),
]


@pytest.mark.parametrize(("overrides", "message"), SAMPLING)
def test_options_of_dynamic_sampling_that_contradict_are_refused_with_the_way_out(models, overrides, message):
    with pytest.raises(ValueError, match=message):
        check(load(models, *overrides), world_size=2)


def test_stale_responses_are_allowed_where_something_corrects_them(models):
    correction = ["actor.old_logprobs=auto", f"{CORRECTION}.rollout_is=token"]
    for overrides in ([], correction, [f"{FILTER}.on_exhausted=carry_over", f"{FILTER}.max_dynamic_samples=64"]):
        check(load(models, "rollout.staleness=1", *overrides), world_size=2)


def test_a_run_that_was_begun_from_another_is_not_begun_again_over_what_it_has_saved(models):
    other, own = models / "other" / "checkpoints" / "step_000020", models / "run" / "checkpoints"
    for folder in (other, own / "step_000010"):
        folder.mkdir(parents=True)

    def start(checkpoint):
        options = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={checkpoint}"]
        check(load(models, f"trainer.output_dir={models / 'run'}", *options), world_size=2)

    start(other)
    (own / "latest").write_text("step_000030")
    start(own / "step_000010")
    with pytest.raises(ValueError, match=r"resume_from_path=.*step_000020: .*has step_000030 of its own.*mode=auto"):
        start(other)


@pytest.mark.parametrize(("overrides", "message"), ALGORITHM)
def test_options_of_the_algorithm_that_contradict_are_refused_with_the_way_out(models, overrides, message):
    with pytest.raises(ValueError, match=message):
        check(load(models, *overrides), world_size=2)


# overrides, what the message names
RAY = "rollout.backend=ray"
OVERLAP = [RAY, "trainer.loop=one_step_off", "actor.old_logprobs=auto", f"{CORRECTION}.rollout_is=token"]
ENGINES = [
    ([RAY, "rollout.ray.timeout_s=0"], r"rollout\.ray\.timeout_s=0.*above 0"),
    ([RAY, "rollout.ray.max_replacements=-1"], r"max_replacements=-1.*0 or more"),
    ([RAY, "rollout.ray.object_store_mb=64"], r"object_store_mb=64.*at least 75"),
    ([RAY, "weights.push=direct"], r"weights\.push=direct.*set weights\.push=auto"),
    ([RAY, "actor.megatron.grad_offload=true"], r"grad_offload=true.*rollout\.backend=ray"),
    (["trainer.loop=one_step_off"], r"loop=one_step_off.*set rollout\.backend=ray"),
    ([RAY, "trainer.loop=one_step_off"], r"loop=one_step_off.*set rollout_is=token"),
    ([*OVERLAP, "actor.moe.router_replay=true"], r"loop=one_step_off.*switch the replay off"),
    ([*OVERLAP, "rollout.staleness=1"], r"rollout\.staleness=1.*loop=one_step_off"),
]


@pytest.mark.parametrize(("overrides", "message"), ENGINES)
def test_engines_and_loops_that_do_not_go_together_are_refused_with_the_way_out(models, overrides, message):
    with pytest.raises(ValueError, match=message):
        check(load(models, *overrides), world_size=2)


def test_both_loops_and_both_kinds_of_engines_pass_the_check(models):
    for overrides in ([RAY], OVERLAP, ["rollout.ray.num_engines=2"], [RAY, "rollout.tensor_model_parallel_size=4"]):
        check(load(models, *overrides), world_size=2)


def test_every_member_of_the_family_passes_the_check(models):
    for overrides in (
        [*GSPO, "actor.loss_agg_mode=seq-mean-token-mean", f"{CORRECTION}.rollout_is=sequence"],
        ["actor.loss_mode=cispo", "actor.old_logprobs=recompute", f"{CORRECTION}.rollout_is=token",
         f"{CORRECTION}.rollout_rs=seq_mean_k1"],
        ["actor.loss_agg_mode=seq-mean-token-sum-norm", "algorithm.norm_adv_by_std_in_grpo=false"],
        ["actor.use_kl_loss=true", "actor.kl_loss_coef=0.001", "ref.param_offload=true"],
        ["algorithm.adv_estimator=reinforce_plus_plus_baseline", "algorithm.use_kl_in_reward=true",
         "algorithm.kl_ctrl.kl_coef=0.001"],
    ):  # fmt: skip
        check(load(models, *overrides), world_size=2)


def test_the_constant_length_is_that_of_the_longest_response_unless_given(models):
    assert load(models).actor.loss_scale_factor == load(models).data.max_response_length
    assert load(models, "actor.loss_scale_factor=7").actor.loss_scale_factor == 7


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [([], False), (["actor.use_kl_loss=true"], True), (["algorithm.use_kl_in_reward=true"], True)],
)
def test_a_reference_model_is_built_only_for_options_that_need_it(models, overrides, needed):
    assert load(models, *overrides).needs_reference is needed


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


@pytest.mark.parametrize("entry", ["rope_parameters", "rope_scaling"])  # of transformers 5, and before
def test_fused_rotary_embeddings_are_refused_where_positions_have_several_dimensions(entry):
    text = {**DENSE, entry: {"rope_type": "default", "mrope_section": [24, 20, 20]}}
    options = MegatronConfig(apply_rope_fusion=True)
    with pytest.raises(ValueError, match=r"apply_rope_fusion=True.*mrope_section is \[24, 20, 20\]; set it to false"):
        check_model_fits(options, RolloutConfig(), text)
    check_model_fits(MegatronConfig(), RolloutConfig(), text)
    check_model_fits(options, RolloutConfig(), {**DENSE, entry: {"rope_type": "default"}})


@pytest.mark.parametrize("content", [None, "not json"])
def test_a_model_folder_without_a_readable_config_is_refused(tmp_path, content):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.path=.*config\.json"):
        check(load_config(["experiment=quickstart", f"model.path={tmp_path}"]), world_size=2)


def test_a_refused_run_prints_one_line_on_rank_0_only_and_fails(models, monkeypatch, capsys):
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("dapo_mcore.train.CAUSE_SPEAKS_S", 0.0)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert main(["experiment=quickstart", f"model.path={models / 'moe'}", "rollout.n=1"]) != 0
    told = capsys.readouterr().err
    assert told.count("error:") == 1
    assert told.count("\n") == 1


def test_a_device_that_cannot_be_used_is_told_in_one_line_before_anything_is_built(models, monkeypatch, capsys):
    launched = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    environment = {"DAPO_PLATFORM": "tpu", **launched}
    left_behind = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    for name, value in (environment | left_behind).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("dapo_mcore.train.CAUSE_SPEAKS_S", 0.0)
    platform.cache_clear()
    assert main(["experiment=quickstart", f"model.path={models / 'moe'}"]) != 0
    platform.cache_clear()
    told = capsys.readouterr().err
    assert told == "error: DAPO_PLATFORM=tpu: no such platform; use one of cpu, cuda, npu, or unset\n"


def test_options_are_read_and_checked_without_importing_torch():
    program = "import sys, dapo_mcore.train as t; t.main(['rollout.m=1']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0
