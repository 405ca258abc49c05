"""Ask other projects what they compute on random inputs, and store inputs and answers for the unit tests.

Runs where verl, trl and liger-kernel are installed (requirements.txt), in an environment apart from the product's:

    python tests/oracle/make_values.py [folder]

One safetensors file per peer, everything in float64 (inputs are float32 values), named after what was asked;
metadata holds the peer's name and version and the options. Padded layout: B responses of at most T tokens.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from inputs import CLIP_HIGH, CLIP_LOW, DUAL_CLIPS, Batch, Values, draw_batch, draw_groups, response_mask, with_gradient
from safetensors.torch import save_file
from torch import Tensor
from variants import CORRECTIONS, trl_variants, verl_variants

FOLDER = Path(__file__).parents[1] / "data" / "oracle"
KL_COEFF = 0.04
TEMPERATURE = 0.7
MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
ESTIMATORS = ("k1", "k2", "k3")
MAX_LENGTH, BUFFER = 64, 16


def verl_policy_losses(batch: Batch) -> Values:
    from verl.trainer.ppo.core_algos import compute_policy_loss

    mask, advantages = batch.mask.double(), batch.advantages[:, None].expand_as(batch.mask)

    def ask(logprobs: Tensor, c: float, mode: str) -> tuple[Tensor, ...]:
        return compute_policy_loss(
            batch.old_logprobs, logprobs, advantages, mask, None, CLIP_LOW, CLIP_HIGH, c, mode
        )  # fmt: skip

    values: Values = {}
    for c in DUAL_CLIPS:
        for mode in MODES:
            loss_of = partial(lambda c, mode, logprobs: ask(logprobs, c, mode)[0], c, mode)
            values |= with_gradient(f"policy.{mode}.c{c:g}", loss_of, logprobs=batch.logprobs)
        _, clipped, ppo_kl, dual_clipped = ask(batch.logprobs, c, MODES[0])
        values |= {f"policy.c{c:g}.clip_fraction": clipped, f"policy.c{c:g}.dual_clip_fraction": dual_clipped}
    return values | {"policy.ppo_kl": ppo_kl}


def verl_rank_losses(batch: Batch) -> Values:
    """A token mean (of the k2 estimates) as each of two data-parallel ranks computes it from its half of the rows."""
    from verl.trainer.ppo.core_algos import agg_loss, kl_penalty

    matrix, mask, half = kl_penalty(batch.logprobs, batch.ref_logprobs, "k2"), batch.mask.double(), len(batch.mask) // 2
    return {
        f"kl.k2.rank{rank}": agg_loss(matrix[rows], mask[rows], "token-mean", dp_size=2, batch_num_tokens=mask.sum())
        for rank, rows in enumerate((slice(0, half), slice(half, None)))
    }


def verl_kl_losses(batch: Batch) -> Values:
    """Each estimator near the reference, and k3 so far from it that verl's bound on its value acts."""
    from verl.trainer.ppo.core_algos import agg_loss, kl_penalty

    def loss_of(estimator: str, ref_logprobs: Tensor, logprobs: Tensor) -> Tensor:
        return agg_loss(kl_penalty(logprobs, ref_logprobs, estimator), batch.mask.double(), "token-mean")

    far = batch.logprobs + 6 * (batch.ref_logprobs - batch.logprobs)
    values = {"input.far_ref_logprobs": far}
    for name in ESTIMATORS:
        values |= with_gradient(f"kl.{name}", partial(loss_of, name, batch.ref_logprobs), logprobs=batch.logprobs)
    return values | with_gradient("kl.k3.far", partial(loss_of, "k3", far), logprobs=batch.logprobs)


def verl_entropy(rows: int = 6, columns: int = 7, vocabulary: int = 5) -> Values:
    from verl.trainer.ppo.core_algos import compute_entropy_loss

    g = torch.Generator().manual_seed(2)
    mask = response_mask(rows, columns, g)
    logits = (3 * torch.randn(rows, columns, vocabulary, generator=g)).double()
    answer = with_gradient("entropy", lambda logits: compute_entropy_loss(logits, mask.double()), logits=logits)
    return {"input.entropy.logits": logits, "input.entropy.mask": mask} | answer


def verl_advantages() -> Values:
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    rewards, groups = draw_groups()
    ask = {"response_mask": torch.ones(len(rewards), 1).double(), "index": groups.numpy()}
    values = {"input.group.rewards": rewards, "input.group.index": groups}
    for name, by_std in (("std", True), ("mean", False)):
        answer, _ = compute_grpo_outcome_advantage(rewards[:, None].clone(), norm_adv_by_std_in_grpo=by_std, **ask)
        values[f"advantage.{name}"] = answer[:, 0]
    return values


def verl_overlong() -> Values:
    """The reward of a right answer with each length up to the limit, penalty factors 1 and 0.5."""
    from verl import DataProto
    from verl.workers.reward_manager.dapo import DAPORewardManager

    lengths = torch.arange(1, MAX_LENGTH + 1)
    responses = torch.ones(len(lengths), MAX_LENGTH, dtype=torch.int64)
    attention = torch.cat([torch.ones(len(lengths), 1), torch.arange(MAX_LENGTH) < lengths[:, None]], dim=1).long()
    truth = np.array([{"ground_truth": "1"}] * len(lengths), dtype=object)
    source = np.array(["math"] * len(lengths), dtype=object)
    data = DataProto.from_dict(
        {"prompts": responses[:, :1], "responses": responses, "attention_mask": attention},
        {"reward_model": truth, "data_source": source},
    )
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "1", eos_token="</s>")
    values: Values = {"input.overlong.lengths": lengths}
    for factor in (1.0, 0.5):
        buffer = SimpleNamespace(enable=True, len=BUFFER, penalty_factor=factor, log=False)
        manager = DAPORewardManager(tokenizer, 0, lambda **_: 1.0, "data_source", MAX_LENGTH, buffer)
        values[f"overlong.factor{factor:g}"] = manager(data).sum(dim=1)
    return values


def trl_stand_in(batch: Batch, logprobs: Tensor, beta: float, delta: float | None) -> SimpleNamespace:
    """What GRPOTrainer._compute_loss reads from the trainer, for one process and one micro-batch."""
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        loss_type="dapo", importance_sampling_level="token", epsilon_low=CLIP_LOW, epsilon_high=CLIP_HIGH, beta=beta,
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x),
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, aux_loss_enabled=False,
        _entropy_bonus_enabled=False, _metrics={"train": defaultdict(list)},
    )  # fmt: skip


def trl_policy_losses(batch: Batch) -> Values:
    from trl.trainer.grpo_trainer import GRPOTrainer

    ids = torch.ones_like(batch.mask, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids,
        "completion_mask": batch.mask.double(), "advantages": batch.advantages, "old_per_token_logps":
        batch.old_logprobs, "ref_per_token_logps": batch.ref_logprobs, "num_items_in_batch": batch.mask.sum(),
    }  # fmt: skip
    values: Values = {}
    for name, beta, delta in (("plain", 0.0, None), ("dual_clip", 0.0, DUAL_CLIPS[0]), ("kl", KL_COEFF, DUAL_CLIPS[0])):

        def loss_of(logprobs: Tensor, beta: float = beta, delta: float | None = delta) -> Tensor:
            return GRPOTrainer._compute_loss(trl_stand_in(batch, logprobs, beta, delta), None, dict(inputs))

        values |= with_gradient(f"policy.{name}", loss_of, logprobs=batch.logprobs)
    return values


def liger_fused_losses(rows: int = 8, columns: int = 10, hidden_size: int = 16, vocabulary: int = 31) -> Values:
    """From hidden states and LM head to loss and both gradients, at a temperature."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    g = torch.Generator().manual_seed(4)
    mask = response_mask(rows, columns, g)
    hidden = torch.randn(rows, columns, hidden_size, generator=g)
    weight = 0.3 * torch.randn(vocabulary, hidden_size, generator=g)
    targets = torch.randint(vocabulary, (rows, columns), generator=g)
    advantages = torch.randn(rows, generator=g)
    logprobs = (hidden @ weight.T / TEMPERATURE).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    old = logprobs + 0.7 * torch.randn(rows, columns, generator=g)
    ref = logprobs + 0.3 * torch.randn(rows, columns, generator=g)
    inputs = {
        "mask": mask,
        "hidden": hidden.double(),
        "weight": weight.double(),
        "targets": targets,
        "advantages": advantages.double(),
        "old_logprobs": old.double(),
        "ref_logprobs": ref.double(),
    }
    values = {f"input.{name}": tensor for name, tensor in inputs.items()}
    for name, beta in (("policy", 0.0), ("kl", KL_COEFF)):
        ask = LigerFusedLinearGRPOLoss(
            beta=beta, compiled=False, use_ref_model=beta > 0, epsilon_low=CLIP_LOW, epsilon_high=CLIP_HIGH,
            loss_type="dapo", temperature=TEMPERATURE, delta=DUAL_CLIPS[0],
        )  # fmt: skip

        def loss_of(hidden: Tensor, weight: Tensor, ask: torch.nn.Module = ask) -> Tensor:
            old, ref = inputs["old_logprobs"], inputs["ref_logprobs"]
            return ask(hidden, weight, targets, mask.double(), inputs["advantages"], old_per_token_logps=old,
                       ref_per_token_logps=ref)[0]  # fmt: skip

        values |= with_gradient(name, loss_of, hidden=inputs["hidden"], weight=inputs["weight"])
    return values


def ask_verl() -> Values:
    batch = draw_batch()
    return (
        batch.values() | verl_policy_losses(batch) | verl_rank_losses(batch) | verl_kl_losses(batch) | verl_entropy()
        | verl_advantages() | verl_overlong() | verl_variants(batch)
    )  # fmt: skip


def ask_trl() -> Values:
    batch = draw_batch()
    return batch.values() | trl_policy_losses(batch) | trl_variants(batch, trl_stand_in)


PEERS: dict[str, Callable[[], Values]] = {"verl": ask_verl, "trl": ask_trl, "liger-kernel": liger_fused_losses}


def main(folder: Path) -> None:
    options = {
        "clip_ratio_low": CLIP_LOW,
        "clip_ratio_high": CLIP_HIGH,
        "clip_ratio_c": DUAL_CLIPS,
        "kl_coeff": KL_COEFF,
        "temperature": TEMPERATURE,
        "max_response_length": MAX_LENGTH,
        "overlong_buffer": BUFFER,
        "corrections": CORRECTIONS,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for peer, ask in PEERS.items():
        values = {name: tensor.detach().contiguous().clone() for name, tensor in ask().items()}
        metadata = {"peer": peer, "version": version(peer)} | {name: str(value) for name, value in options.items()}
        save_file(values, folder / f"{peer}.safetensors", metadata)
        print(f"{peer} {version(peer)}: {len(values)} tensors in {folder / peer}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
