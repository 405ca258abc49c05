"""python -m tools.bench push [--model NAME ...] [--repeat N | --check]: seconds and GB/s of a push of weights to vLLM.

In one run per model, one process: the push by a plan with its attestation, the engine's own reload, and the floor, one
copy of the same tensors. On an accelerator also vLLM's load_weights alone. The calls take turns and the fastest of N
counts; the share of the attestation is what a push without it saves. Where the engine's layout is private, only the
reload is there to be measured. --check measures nothing, but compares what an engine samples after two pushes with what
a freshly loaded one does.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from launch.sites import find_platform
from tools.certificate.spawn import spawn
from tools.figures import Figure, as_json

SIZES = {
    "vocab_size": 32000,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
EXPERTS = {"num_experts": 32, "num_experts_per_tok": 4, "norm_topk_prob": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("Qwen3Moe", {**SIZES, **EXPERTS, "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 2,
                          "intermediate_size": 256, "moe_intermediate_size": 64}),
    "dense-200M": ("Qwen3", {**SIZES, "hidden_size": 768, "num_hidden_layers": 18, "intermediate_size": 3072}),
    "moe-200M": ("Qwen3Moe", {**SIZES, **EXPERTS, "hidden_size": 512, "num_hidden_layers": 8,
                              "intermediate_size": 1024, "moe_intermediate_size": 384}),
    # 8 layers of Qwen3-30B-A3B: what the bar of a push is for
    "moe-11GB": ("Qwen3Moe", {**SIZES, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
                              "vocab_size": 151_936, "num_attention_heads": 32, "head_dim": 128, "hidden_size": 2048,
                              "num_key_value_heads": 4, "num_hidden_layers": 8, "intermediate_size": 6144,
                              "moe_intermediate_size": 768}),
}  # fmt: skip
Sampled = tuple[tuple[int, ...], tuple[float, ...]]  # token ids and log-probabilities of a response
EXPORTED = "exported"
LENGTHS: dict[str, Any] = {"max_prompt_length": 64, "max_response_length": 64}
DEFAULT = ("tiny", "dense-200M", "moe-200M")
PUSH_MS_PER_GB = 14 / 11.2  # the bars, for accelerators that hold the model twice
ATTESTATION = 5.0  # percent of a push
LIMIT_S = 1500.0  # for one model
UNMEASURED = (
    "no accelerator here: vLLM's load_weights beside it, writing into live parameters, and the bar (14 ms for 11.2 GB) "
    "are left to be measured on one. On a CPU a push ends with packing, which an accelerator has not."
)


class Letters:
    """Stands for a tokenizer."""

    eos_token_id: int | None = None

    def decode(self, token_ids: Any, *, skip_special_tokens: bool) -> str:
        return ""


class Trust:
    """Stands for an attestation, and sums nothing up."""

    def __init__(self, sizes: Any) -> None: ...

    def sent(self, rectangles: Any) -> None: ...

    def received(self, rectangles: Any) -> None: ...

    def faults(self) -> list[Any]:
        return []


def save_model(name: str, folder: Path) -> None:
    """Random weights in bfloat16."""
    import transformers  # in this process only: those that train must load Megatron before

    kind, options = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**options)
    torch.set_default_dtype(torch.bfloat16)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)


def start(folder: Path) -> tuple[Any, list[Any], Any, Any]:
    """The model's configuration, its chunks under Megatron, an engine with the same weights, and the push between; None
    where nothing but the engine's loader may write to it."""
    from dapo_mcore.actor import parallel
    from dapo_mcore.actor.build import build_chunks, read_hf_config, transformer_config
    from dapo_mcore.config import Dtype, MegatronConfig, RolloutConfig
    from dapo_mcore.handover import plan_push
    from dapo_mcore.weights import load_hf

    megatron = MegatronConfig()
    parallel.init_model_parallel(megatron, seed=0)
    hf = read_hf_config(folder)
    chunks = build_chunks(hf, transformer_config(hf, megatron, Dtype.bf16))
    load_hf(chunks, folder, hf)
    push = plan_push(megatron, RolloutConfig(), hf, chunks, bucket_mb=256)
    engine = build_engine(folder)
    obstacle = engine.examine(lambda runtime: runtime.obstacle or push.misfit(runtime))
    if obstacle:
        print(f"no direct push: {obstacle}", flush=True)
    return hf, chunks, engine, None if obstacle else push


def build_engine(folder: Path) -> Any:
    from dapo_mcore.config import ModelConfig, RolloutConfig
    from dapo_mcore.rollout.colocated import ColocatedEngine

    rollout = RolloutConfig(kv_cache_mb=128)
    return ColocatedEngine(ModelConfig(path=str(folder)), rollout, Letters(), **LENGTHS)


def check(folder: Path) -> dict[str, bool]:
    """Whether two pushes of changed weights changed what the engine samples, and whether it is then, bit for bit, what
    an engine loaded from the exported weights samples. Each engine has a process of its own: one that can sleep bears
    no other beside it.
    """
    ((before, pushed),) = spawn(sample_around_pushes, 1, folder, limit_s=LIMIT_S)
    (loaded,) = spawn(sample_loaded, 1, folder / EXPORTED, limit_s=LIMIT_S)
    return {"changed": pushed != before, "equal": pushed == loaded}


def sample_around_pushes(folder: Path) -> tuple[list[Sampled], list[Sampled]]:
    """Before two pushes of changed weights, and after them; the weights are exported. As a rank of a world of one."""
    from dapo_mcore.weights import hf_weights, save_hf

    hf, chunks, engine, push = start(folder)
    before = sample(engine)
    for version in (1, 2):
        for parameter in (parameter.data for chunk in chunks for parameter in chunk.parameters()):
            parameter += torch.randn_like(parameter) * parameter.std(correction=0) / 4
        if push is None:
            engine.load(hf_weights(chunks, hf), version)
        else:
            engine.write(push, version)
    pushed = sample(engine)
    save_hf(hf_weights(chunks, hf), hf, folder, folder / EXPORTED)
    return before, pushed


def sample_loaded(folder: Path) -> list[Sampled]:
    """By an engine with the weights of the folder; as a rank of a world of one."""
    return sample(build_engine(folder))


def sample(engine: Any) -> list[Sampled]:
    from dapo_mcore.rollout.engine import Request, Sampling, generate
    from dapo_mcore.types import Prompt

    prompts = (Prompt(uid, uid, tuple(range(1 + uid, 33 + uid)), "", "") for uid in range(8))
    requests = [Request(prompt, 0, seed=prompt.uid) for prompt in prompts]
    responses = generate(engine, requests, Sampling(temperature=1.0, max_tokens=32))
    return [(response.token_ids, response.logprobs) for response in responses]


def measure(folder: Path, repeat: int) -> dict[str, float]:
    """Seconds, each the fastest of `repeat`; runs in a process of its own, as a rank of a world of one."""
    from dapo_mcore.platform import platform
    from dapo_mcore.weights import hf_weights

    hf, chunks, engine, push = start(folder)
    parameters = [parameter.data for chunk in chunks for parameter in chunk.parameters()]
    copies = [torch.empty_like(parameter) for parameter in parameters]
    gb = sum(parameter.nbytes for parameter in parameters) / 1e9

    def trusting() -> None:
        with mock.patch("dapo_mcore.weights.push.Attestation", Trust):
            engine.write(push, 1)

    def load(runtime: Any) -> None:
        runtime.model.load_weights(hf_weights(chunks, hf))

    calls: dict[str, Callable[[], object]] = {
        "copy": lambda: torch._foreach_copy_(copies, parameters),
        "reload": lambda: engine.load(hf_weights(chunks, hf), 2),
    }
    if push is not None:
        calls |= {"push": lambda: engine.write(push, 1), "trusting": trusting}
    if push is not None and platform().device.type != "cpu":
        calls["load_weights"] = lambda: engine.write(load, 3)
    found = {"gb": gb} | fastest(calls, repeat)
    return found if push is None else found | {"attest": found["push"] - found.pop("trusting")}


def fastest(calls: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Seconds of each call, after one that is not counted. They take turns, so that what else runs meets all alike."""
    from dapo_mcore.platform import platform

    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeat + 1):
        for name, call in calls.items():
            platform().synchronize()
            start = time.perf_counter()
            call()
            platform().synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: min(measured[1:]) for name, measured in seconds.items()}


def told(name: str, found: dict[str, bool]) -> str:
    if not found["changed"]:
        return f"{name}: two pushes of changed weights changed nothing"
    outcome = "equal, bit for bit, to" if found["equal"] else "NOT EQUAL to"
    return f"{name}: after two pushes tokens and log-probabilities are {outcome} those of a freshly loaded engine"


def report(name: str, found: dict[str, float]) -> str:
    gb = found["gb"]
    lines = [f"{name}: {gb:.3f} GB of weights"]
    for what in ("copy", "push", "reload", "load_weights"):
        if what in found:
            lines.append(f"  {what:13}{found[what] * 1e3:9.1f} ms {gb / found[what]:8.2f} GB/s")
    if "attest" in found:
        share = 100 * found["attest"] / found["push"]
        lines.append(f"  attestation  {found['attest'] * 1e3:9.1f} ms {share:8.1f} % of push")
    return "\n".join(lines)


def figures(name: str, found: dict[str, float], is_accelerator: bool) -> list[Figure]:
    """The bars are those of an accelerator; on a CPU a push ends with packing."""
    gb = found["gb"]
    told = [
        Figure(f"{name}: {what}", gb / found[what], "GB/s")
        for what in ("copy", "push", "reload", "load_weights")
        if what in found
    ]
    if "push" in found:
        bars = (PUSH_MS_PER_GB, ATTESTATION) if is_accelerator else (None, None)
        told.append(Figure(f"{name}: time of a push per GB", 1e3 * found["push"] / gb, "ms", bars[0]))
        told.append(Figure(f"{name}: attestation", 100 * found["attest"] / found["push"], "% of the push", bars[1]))
    return told


def equality(name: str, found: dict[str, bool]) -> list[Figure]:
    return [
        Figure(f"{name}: {what}", found[key], bar=1, at_least=True)
        for what, key in (("pushes change what is sampled", "changed"), ("and it equals a fresh engine's", "equal"))
    ]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench push", description=__doc__)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(DEFAULT))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="end with the figures as a line of JSON")
    parser.add_argument("--check", action="store_true", help="measure nothing; exit with 1 if a pushed model differs")
    options = parser.parse_args(arguments)
    is_accelerator = find_platform() != "cpu"
    stated: list[Figure] = []
    for name in options.model:
        with tempfile.TemporaryDirectory() as folder:
            save_model(name, Path(folder))
            if options.check:
                outcome = check(Path(folder))
                print(told(name, outcome), flush=True)
                stated += equality(name, outcome)
            else:
                (found,) = spawn(measure, 1, Path(folder), options.repeat, limit_s=LIMIT_S)
                print(report(name, found), flush=True)
                stated += figures(name, found, is_accelerator)
    if not (options.check or is_accelerator):
        print(UNMEASURED)
    if options.json:
        print(as_json(stated))
    if options.check:
        raise SystemExit(not all(figure.holds for figure in stated))
