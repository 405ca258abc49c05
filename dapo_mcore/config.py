"""Every option of a run, typed, with its default and unit. Imports no torch: a typo is answered within a second.

Names follow verl where the meaning is the same; the paper is DAPO, arXiv:2503.14476. The YAML files under configs/
hold only differences from these defaults. What contradicts is refused by config_check.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import II, MISSING


class Dtype(Enum):
    fp32 = "fp32"
    bf16 = "bf16"


class Truncation(Enum):
    """What happens to a prompt longer than data.max_prompt_length when it is not filtered out."""

    error = "error"
    left = "left"  # drop the beginning
    right = "right"  # drop the end


# How the losses of tokens become one number (algo/aggregation.py); the last is verl's name of the one before.
LossAggMode = Enum(
    "LossAggMode",
    {
        "token-mean": "token-mean",  # over all trained tokens of the mini-batch (DAPO)
        "seq-mean-token-sum": "seq-mean-token-sum",
        "seq-mean-token-mean": "seq-mean-token-mean",  # GRPO
        "token-sum-norm": "token-sum-norm",  # Dr.GRPO
        "seq-mean-token-sum-norm": "token-sum-norm",
    },
)


class LossMode(Enum):
    """What the importance ratio is of, and what the clip does."""

    vanilla = "vanilla"  # of each token, decoupled and dual clip (DAPO, PPO)
    gspo = "gspo"  # geometric mean over the response, no dual clip (arXiv:2507.18071)
    cispo = "cispo"  # of each token; the ratio is clipped as a constant weight (arXiv:2506.13585)


class KlEstimator(Enum):
    """Of KL(policy || reference) from a sampled token, with d = log pi - log pi_ref."""

    k1 = "k1"  # d; as a loss its expected gradient is 0
    k2 = "k2"  # d^2 / 2; as a loss its expected gradient is that of the KL
    k3 = "k3"  # exp(-d) - 1 + d
    low_var_kl = "low_var_kl"  # k3 with d clamped to +-20 and the value to at most 10


class AdvEstimator(Enum):
    """Advantages from the rewards of a group (algo/advantage.py)."""

    grpo = "grpo"
    rloo = "rloo"
    reinforce_plus_plus_baseline = "reinforce_plus_plus_baseline"


class RolloutIs(Enum):
    """Of what the importance weight pi_old / pi_rollout is formed (algo/mismatch.py)."""

    none = "none"
    token = "token"
    sequence = "sequence"  # the product over the response


class RolloutRs(Enum):
    """Of what pi_old / pi_rollout must stay within its bounds for a token to be trained on (algo/mismatch.py)."""

    none = "none"
    token_k1 = "token_k1"
    seq_sum_k1 = "seq_sum_k1"  # the product over the response
    seq_mean_k1 = "seq_mean_k1"  # the geometric mean over the response


class OldLogprobs(Enum):
    """Where the clip's pi_old comes from."""

    auto = "auto"  # skip when a step makes one update (the ratio is then exactly 1) and nothing else needs them
    recompute = "recompute"  # a forward pass of the policy before the first update
    rollout = "rollout"  # what the engine reported while sampling


class Recompute(Enum):
    """Megatron activation recomputation."""

    none = "none"
    selective = "selective"  # core attention only
    full = "full"  # every layer


class OnExhausted(Enum):
    """What a step does when max_num_gen_batches is spent and too few groups passed the filter."""

    train_partial = "train_partial"  # train on what passed; the token denominator follows
    carry_over = "carry_over"  # train on nothing: what passed waits, up to rollout.staleness steps
    stop = "stop"  # save a checkpoint and end the run with the reason


class ResumeMode(Enum):
    auto = "auto"  # from the newest complete checkpoint in trainer.output_dir, if there is one
    disable = "disable"
    resume_path = "resume_path"  # from trainer.resume_from_path, whenever the command starts; an interrupted run: auto


class PushMode(Enum):
    """How the policy's weights get into the rollout engine."""

    auto = "auto"  # direct where the engine's layout is known, else reload
    direct = "direct"  # into the live parameters, each rank its own part
    reload = "reload"  # whole tensors through the engine's own loader


class Attest(Enum):
    """How a push is proven to have arrived."""

    checksums = "checksums"  # counts and checksums on both sides, with a direct push; a reload counts names
    full = "full"  # besides: the engine's log-probabilities of a fixed prompt against the policy's


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    path: str = MISSING  # folder with HF config.json, safetensors and tokenizer
    dtype: Dtype = Dtype.bf16  # of the policy's parameters and of rollout; gradients and optimizer are fp32


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """Where prompts come from: files, or a reasoning-gym task."""

    files: list[str] = field(default_factory=list)  # .jsonl or .parquet
    prompt_key: str = "prompt"  # a string, or a list of {role, content} messages
    answer_key: str = "answer"
    answer_pattern: str = ""  # regular expression whose first group is the answer, e.g. '#### (.+)' for GSM8K
    task: str = ""  # reasoning-gym task name; excludes `files`
    task_options: dict[str, Any] = field(default_factory=dict)  # of the task, e.g. {min_terms: 4}
    size: int = -1  # number of problems; -1: all (files only)
    seed: int = 0  # of the task's problems; item i of a task is drawn from seed + i


@dataclass(kw_only=True, slots=True)
class DataConfig:
    train: SourceConfig = field(default_factory=SourceConfig)
    val: SourceConfig = field(default_factory=SourceConfig)  # several files, or data_source: also measured apart
    exclude_val_from_train: bool = True  # drop training prompts whose text is also in validation, and count them
    image_key: str = "images"  # column with a row's pictures, one for each <image> in its text; "": read none
    # Of a picture; a larger one is refused, and none takes more than max_pixels / 1,024 tokens.
    max_pixels: int = 1 << 20
    instruction: str = ""  # appended to every question, e.g. "Put the final answer in \\boxed{}."
    apply_chat_template: bool = True  # False: the prompt's text as it is
    max_prompt_length: int = 1024  # tokens
    max_response_length: int = 1024  # tokens; L_max of eq. 13
    filter_overlong_prompts: bool = True  # drop prompts above max_prompt_length, and count them
    truncation: Truncation = Truncation.error
    shuffle: bool = True  # by trainer.seed and epoch
    train_batch_size: int = 512  # prompts (groups) that train one step
    gen_batch_size: int = 0  # prompts of a generation batch, the unit of max_num_gen_batches; 0: train_batch_size


@dataclass(kw_only=True, slots=True)
class ValConfig:
    """Sampling at validation. pass@k needs n >= k."""

    n: int = 1  # responses per problem; mean@n and pass@n are logged
    temperature: float = 1.0  # 0: greedy
    top_p: float = 0.7  # the paper's evaluation
    top_k: int = -1
    greedy: bool = False  # also report one greedy response per problem, as val/accuracy_greedy


@dataclass(kw_only=True, slots=True)
class TemperatureStage:
    until: float = MISSING  # share of trainer.total_training_steps; the stage holds for steps that begin before it
    value: float = MISSING


@dataclass(kw_only=True, slots=True)
class GroupSizeStage:
    until: float = MISSING  # as above
    value: int = MISSING


class RolloutBackend(Enum):
    colocated = "colocated"  # engines in the trainer's processes, on its devices
    ray = "ray"  # engines in Ray actors, on devices of their own


@dataclass(kw_only=True, slots=True)
class RayConfig:
    """The engines of rollout.backend=ray. Each takes rollout.tensor_model_parallel_size accelerators of one machine,
    where the trainer has any.
    """

    address: str = ""  # of a running cluster, or auto; empty: a cluster of this run's own, on this machine alone
    num_engines: int = 1
    cpus_per_engine: float = 1.0  # what Ray reckons for it
    object_store_mb: int = 128  # MiB of shared memory, for a cluster of this run's own
    start_timeout_s: float = 900.0  # an engine that is not ready after so long is replaced
    timeout_s: float = 120.0  # likewise one that has not answered for so long; above a push and a slice of decoding
    max_replacements: int = 4  # engines replaced between two pushes; one more ends the run


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    backend: RolloutBackend = RolloutBackend.colocated
    ray: RayConfig = field(default_factory=RayConfig)
    n: int = 16  # G: responses per prompt
    n_schedule: list[GroupSizeStage] = field(default_factory=list)  # stages before n, e.g. [{until: 0.3, value: 32}]
    temperature: float = 1.0  # also divides the policy's logits in the loss
    temperature_schedule: list[TemperatureStage] = field(default_factory=list)  # stages before temperature
    top_p: float = 1.0  # fixed: another value would sample from a distribution the loss does not know
    top_k: int = -1  # fixed, likewise
    tensor_model_parallel_size: int = 1  # devices of one engine; colocated: of so many consecutive ranks
    enable_expert_parallel: bool = False  # spread whole experts over those devices instead of cutting each
    kv_cache_mb: int = 4096  # MiB per device; always explicit
    staleness: int = 0  # steps that responses sampled ahead may wait to be trained on; 0: exact DAPO, they are dropped
    max_num_seqs: int = 256  # sequences decoded together per engine
    max_num_batched_tokens: int = 8192  # read and sampled in one step of an engine; on a CPU at least a sequence's
    enforce_eager: bool = False  # True: no graph capture; always so on CPU
    val: ValConfig = field(default_factory=ValConfig)


@dataclass(kw_only=True, slots=True)
class OverlongBufferConfig:
    """Soft overlong punishment, eq. 13: 0 up to L_max - len, then falling linearly to -penalty_factor at L_max."""

    enable: bool = True
    len: int = 256  # L_cache, tokens
    penalty_factor: float = 1.0


@dataclass(kw_only=True, slots=True)
class RewardConfig:
    # math | geometry | geometry_accuracy | reasoning_gym | exact_match | package.module:function
    verifier: str = "math"
    overlong_buffer: OverlongBufferConfig = field(default_factory=OverlongBufferConfig)
    num_workers: int = 1  # verifier processes
    timeout_s: float = 10.0  # per response; the worker is killed and replaced
    max_failure_rate: float = 0.1  # share of the latest 1,024 responses without a verdict above which the run stops


@dataclass(kw_only=True, slots=True)
class FilterGroupsConfig:
    """Dynamic sampling, eq. 11: keep groups whose raw accuracies are not all equal (verl's metric=acc)."""

    enable: bool = True
    max_num_gen_batches: int = 10  # a step reads so many times data.gen_batch_size prompts at most
    on_exhausted: OnExhausted = OnExhausted.train_partial
    max_dynamic_samples: int = 0  # a group without variance grows by rollout.n up to so many responses; 0: it does not


@dataclass(kw_only=True, slots=True)
class KlCtrlConfig:
    kl_coef: float = 0.0  # subtracted from a response's reward per nat of KL, with use_kl_in_reward


@dataclass(kw_only=True, slots=True)
class AlgorithmConfig:
    filter_groups: FilterGroupsConfig = field(default_factory=FilterGroupsConfig)
    adv_estimator: AdvEstimator = AdvEstimator.grpo
    use_kl_in_reward: bool = False  # subtract the KL of old policy and reference, summed over the response
    kl_penalty: KlEstimator = KlEstimator.k1  # of the KL in the reward
    kl_ctrl: KlCtrlConfig = field(default_factory=KlCtrlConfig)
    norm_adv_by_std_in_grpo: bool = True  # eq. 9; False: Dr.GRPO
    std_ddof: int = 1  # 1: unbiased standard deviation (verl); 0: population
    overlong_filtering: bool = False  # mask truncated responses out of the loss; they still count in mean and std


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW."""

    lr: float = 1e-6
    lr_warmup_steps: int = 0  # training steps (not updates) of linear warm-up; the paper: 20
    lr_decay_style: str = "constant"  # constant | linear | cosine
    min_lr: float = 0.0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad: float = 1.0  # global gradient norm


@dataclass(kw_only=True, slots=True)
class MegatronConfig:
    """Layout of the policy; data parallel is world size / (tensor x pipeline x context)."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1  # stages; schedule 1F1B
    virtual_pipeline_model_parallel_size: int = 1  # chunks of layers per stage; above 1: interleaved 1F1B
    context_parallel_size: int = 1  # ranks that share every sequence, cut zigzag
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    sequence_parallel: bool = False
    recompute: Recompute = Recompute.none
    # Fused kernels; a CPU has none of them.
    use_fused_rmsnorm: bool = True  # MindSpeed; Transformer Engine's norms always are
    use_fused_swiglu: bool = True  # MindSpeed
    moe_grouped_gemm: bool = True  # all experts of a rank in one matrix product
    moe_permute_fusion: bool = False
    apply_rope_fusion: bool = False  # not for rotary embeddings in several dimensions (mrope)
    deterministic_mode: bool = False  # slower kernels and collectives that repeat their results bit for bit
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False  # sum gradients over ranks while the backward still runs
    overlap_param_gather: bool = False  # gather updated parameters while the next forward runs
    param_offload: bool = False  # parameters lie in host memory while the engine samples
    grad_offload: bool = False  # gradient buffers have no memory meanwhile
    optimizer_offload: bool = False  # main parameters and moments lie in host memory meanwhile


@dataclass(kw_only=True, slots=True)
class RolloutCorrectionConfig:
    """What is done about the gap between engine and trainer, rho = pi_old / pi_rollout (algo/mismatch.py)."""

    rollout_is: RolloutIs = RolloutIs.none  # weight of the policy term; the denominator keeps every token
    rollout_is_threshold: float = 2.0  # upper bound of the weight
    rollout_is_threshold_lower: float = 0.0  # 0: truncate above (TIS); else weight 0 outside the bounds (IcePop)
    rollout_rs: RolloutRs = RolloutRs.none  # mask out; masked tokens leave the denominator
    rollout_rs_threshold: float = 2.0  # upper bound of rho
    rollout_rs_threshold_lower: float = 0.0  # 0: 1 / rollout_rs_threshold


@dataclass(kw_only=True, slots=True)
class MoeConfig:
    """Routers of a mixture-of-experts policy."""

    router_replay: bool = False  # the experts chosen at rollout also in every pass of the actor (R3, arXiv:2510.11370)
    seq_aux_loss_coeff: float = 0.0  # sequence-wise balance loss, summed over layers; arXiv:2412.19437, eq. 17
    z_loss_coeff: float = 0.0  # squared logsumexp of a router's logits, mean over tokens, summed over layers


class TowerTraining(Enum):
    """What is trained of the vision tower."""

    frozen = "frozen"
    mergers = "mergers"  # what turns its patches into the decoder's tokens, the deepstack's included
    all = "all"


@dataclass(kw_only=True, slots=True)
class VisionConfig:
    """The vision tower of a policy that sees images."""

    train: TowerTraining = TowerTraining.frozen
    split_images: bool = False  # tensor and context parallel ranks share the images out; False: each computes all


@dataclass(kw_only=True, slots=True)
class ActorConfig:
    ppo_mini_batch_size: int = 32  # prompts (groups) per optimizer update
    ppo_max_token_len_per_gpu: int = 16384  # token budget of a packed micro-batch, per context-parallel rank
    clip_ratio_low: float = 0.2  # epsilon_low
    clip_ratio_high: float = 0.28  # epsilon_high
    clip_ratio_c: float = 10.0  # dual clip: bound of the ratio where the advantage is negative
    loss_mode: LossMode = LossMode.vanilla
    loss_agg_mode: LossAggMode = LossAggMode["token-mean"]
    loss_scale_factor: int = II("data.max_response_length")  # tokens; the constant length of token-sum-norm
    entropy_coeff: float = 0.0
    use_kl_loss: bool = False  # add the KL against the reference model to the loss
    kl_loss_coef: float = 0.0
    kl_loss_type: KlEstimator = KlEstimator.low_var_kl
    rollout_correction: RolloutCorrectionConfig = field(default_factory=RolloutCorrectionConfig)
    old_logprobs: OldLogprobs = OldLogprobs.auto
    optim: OptimConfig = field(default_factory=OptimConfig)
    megatron: MegatronConfig = field(default_factory=MegatronConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)


@dataclass(kw_only=True, slots=True)
class RefConfig:
    """The reference model: the model before training, under the actor's layout. Absent when no option needs it."""

    param_offload: bool = False  # keep its weights in host memory while it does not score


class Loop(Enum):
    """The order of sampling and training."""

    dapo = "dapo"  # in turn: Algorithm 1 (dapo.py)
    one_step_off = "one_step_off"  # a step's groups are sampled while the step before trains (dapo_one_step_off.py)


@dataclass(kw_only=True, slots=True)
class WeightsConfig:
    """The way of the policy's weights into the rollout engine (docs/weights.md)."""

    push: PushMode = PushMode.auto
    bucket_mb: int = 256  # MiB per rank through which a direct push sends and receives at a time
    attest: Attest = Attest.checksums
    max_probe_gap: float = 0.3  # nats, mean over the probe's tokens, above which attest=full ends the run


@dataclass(kw_only=True, slots=True)
class TrainerConfig:
    loop: Loop = Loop.dapo
    total_training_steps: int = MISSING
    output_dir: str = "outputs/run"
    project_name: str = "dapo_mcore"
    experiment_name: str = "run"
    seed: int = 0
    val_before_train: bool = True
    val_only: bool = False  # validate the weights that are given, of model.path or a checkpoint, and end
    test_freq: int = 10  # validate every so many steps and after the last; 0: never
    save_freq: int = 20  # checkpoint every so many steps and after the last; 0: only after the last
    max_ckpt_to_keep: int = 2
    save_hf_model: bool = True  # export the final policy to output_dir/hf_model
    resume_mode: ResumeMode = ResumeMode.auto
    resume_from_path: str = ""
    wandb: bool = False  # besides metrics.jsonl and TensorBoard events, which are always written
    rollouts_to_keep: int = 8  # sampled responses written out per step, to read

    @property
    def validates(self) -> bool:
        return self.val_only or self.val_before_train or self.test_freq > 0


@dataclass(kw_only=True, slots=True)
class RunConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    ref: RefConfig = field(default_factory=RefConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    @property
    def needs_reference(self) -> bool:
        return self.actor.use_kl_loss or self.algorithm.use_kl_in_reward

    @property
    def prompts_per_step(self) -> int:
        """That a step may read to find data.train_batch_size groups."""
        per_batch = self.data.gen_batch_size or self.data.train_batch_size
        return self.algorithm.filter_groups.max_num_gen_batches * per_batch
