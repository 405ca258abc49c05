"""Short runs of the quickstart's experiment: what they are started with, and the checks made of them."""

from __future__ import annotations

from pathlib import Path

from tools.acceptance.check import ACCELERATORS, Check, Command, Here, module, ranks

STEPS, RESUMED_AT = 4, 2
PROBE_GAP = {"fp32": 1e-4, "bf16": 0.3}  # nats; routers flip where numbers are rounded to bfloat16
OPTIONS = (
    "experiment=quickstart",
    "data.train_batch_size=4",
    "data.max_response_length=16",
    "rollout.n=4",
    "reward.overlong_buffer.len=4",
    "reward.verifier=tools.acceptance.reward:even_length",
    "actor.ppo_mini_batch_size=2",
    "actor.ppo_max_token_len_per_gpu=256",
    "actor.old_logprobs=auto",
    f"trainer.total_training_steps={STEPS}",
    f"trainer.save_freq={RESUMED_AT}",
    "trainer.val_before_train=false",
    "trainer.test_freq=0",
    "trainer.save_hf_model=false",
    "weights.attest=full",
)
OFFLOADED = [f"actor.megatron.{part}_offload=true" for part in ("param", "grad", "optimizer")]
DETERMINISTIC = "actor.megatron.deterministic_mode=true"


def train(here: Here, out: Path, *options: str, processes: int = 0) -> Command:
    processes = processes or here.pair
    sizes = {
        "model.path": here.model,
        "model.dtype": here.dtype,
        "rollout.kv_cache_mb": 64 if here.is_small else 1024,
        "actor.megatron.expert_model_parallel_size": processes if here.has_experts else 1,
        "trainer.output_dir": out,
    }
    given = [f"{name}={value}" for name, value in sizes.items()]
    return ranks(here, processes, "dapo_mcore.train", *OPTIONS, *given, *options)


def policy(here: Here) -> list[Command]:
    return [] if here.given_model else [module("tools.acceptance.policy", here.model)]


def probed(here: Here, out: Path, *options: str, processes: int = 0) -> list[Command]:
    look = module("tools.acceptance.evidence", "probe", out / "run", "--bar", PROBE_GAP[here.dtype])
    return [*policy(here), train(here, out / "run", *options, processes=processes), look]


def eager(here: Here, out: Path) -> list[Command]:
    return probed(here, out, "rollout.enforce_eager=true")


def graphs(here: Here, out: Path) -> list[Command]:
    return probed(here, out, "rollout.enforce_eager=false")


def offloaded(here: Here, out: Path) -> list[Command]:
    return probed(here, out, *OFFLOADED)


def experts_apart(here: Here, out: Path) -> list[Command]:
    spread = (f"rollout.tensor_model_parallel_size={here.most}", "rollout.enable_expert_parallel=true")
    return probed(here, out, *spread, processes=here.most)


def twice(here: Here, out: Path) -> list[Command]:
    first, second = (train(here, out / name, DETERMINISTIC) for name in ("run", "again"))
    return [*policy(here), first, second, module("tools.acceptance.evidence", "same", out / "run", out / "again")]


def resumed(here: Here, out: Path) -> list[Command]:
    """A second run goes on from a checkpoint of the first, into a folder of its own."""
    checkpoint = out / "run" / "checkpoints" / f"step_{RESUMED_AT:06d}"
    there = ("trainer.resume_mode=resume_path", f"trainer.resume_from_path={checkpoint}")
    first, second = train(here, out / "run", DETERMINISTIC), train(here, out / "resumed", DETERMINISTIC, *there)
    return [*policy(here), first, second, module("tools.acceptance.evidence", "same", out / "run", out / "resumed")]


CHECKS = (
    Check("run-eager", "a push reaches a live engine that slept: log-probabilities are the policy's", eager),
    Check("run-graphs", "the same with captured graphs, which see the weights of every push", graphs, ACCELERATORS),
    Check("run-offload", "the same with the policy in host memory while the engine samples", offloaded),
    Check("run-expert-parallel", "the same with whole experts spread over the engine's devices, which slept",
          experts_apart, least_devices=2, needs_experts=True),
    Check("run-deterministic", "deterministic_mode repeats a run bit for bit", twice),
    Check("run-resume", "a resumed run has the metrics of an uninterrupted one bit for bit", resumed),
)  # fmt: skip
