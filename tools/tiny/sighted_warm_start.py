"""Supervised training of the tiny model that sees, so that reinforcement learning finds something to do.

First its tower learns to tell digits and places. Then the whole learns to show the work, and towards the end it mostly
sees bare answers, which it gets wrong: what remains is a policy that can read and add, and seldom does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tools.tiny import warm_start
from tools.tiny.perimeters import LABEL_TOKENS, QUESTION, TOKENS, Sides, bare, draw, worked
from tools.tiny.sight import END

DIGITS = 10
IGNORED = -100  # label of what is not to be predicted


@dataclass(frozen=True, slots=True)
class WarmStart(warm_start.WarmStart):
    tower_steps: int = 60  # before `steps`
    steps: int = 720
    lr: float = 3e-3
    min_lr: float = 3e-4
    max_norm: float = 1.0  # of the gradient
    worked_only: float = 0.8


Report = Callable[[int, float], None]  # gets the number of finished steps and the loss before the last, in nats
Demonstrations = Sequence[tuple[Sides, str]]  # (problem, response)


def train(model: Any, processor: Any, problems: Sequence[Sides], recipe: WarmStart, seed: int, report: Report) -> None:
    """Train `model`, a Qwen3VLMoeForConditionalGeneration, in place; `processor` is a Qwen3VLProcessor."""
    rng = Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = nn.Linear(model.config.text_config.hidden_size, DIGITS + TOKENS)
    tower = nn.ModuleList([model.model.visual, probe])

    def seeing(step: int) -> Tensor:
        return sight_loss(tower, processor.image_processor, rng.sample(problems, recipe.batch_size), rng)

    def answering(step: int) -> Tensor:
        return answer_loss(model, processor, demonstrations(problems, step, recipe, rng), rng)

    done = 0
    for module, loss_at, steps in ((tower, seeing, recipe.tower_steps), (model, answering, recipe.steps)):
        for step, loss in enumerate(descent(module, loss_at, recipe, steps), start=done + 1):
            report(step, loss)
        done += steps


def descent(module: nn.Module, loss_at: Callable[[int], Tensor], recipe: WarmStart, steps: int) -> Iterator[float]:
    """The loss before each step, after it."""
    optimizer = torch.optim.AdamW(module.parameters(), recipe.lr, (0.9, recipe.beta2), weight_decay=recipe.weight_decay)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, steps)
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), recipe.max_norm)
        optimizer.step()
        yield loss.item()


def learning_rate(recipe: WarmStart, step: int, steps: int) -> float:
    decayed = recipe.lr + (recipe.min_lr - recipe.lr) * step / steps
    return decayed * min(1.0, (step + 1) / recipe.lr_warmup_steps)


def demonstrations(problems: Sequence[Sides], step: int, recipe: WarmStart, rng: Random) -> Demonstrations:
    """Of one step."""
    chosen = rng.sample(problems, recipe.batch_size)
    return [(sides, worked(sides) if rng.random() < recipe.share_at(step) else bare(sides)) for sides in chosen]


def sight_loss(tower: nn.ModuleList, processor: Any, problems: Sequence[Sides], rng: Random) -> Tensor:
    """Of telling, from a visual token alone, its place and the digit it holds, by a linear probe."""
    visual, probe = tower
    seen = processor([draw(sides, rng) for sides in problems], return_tensors="pt")
    features = visual(seen["pixel_values"], grid_thw=seen["image_grid_thw"]).pooler_output
    digits, places = probe(features).unflatten(0, (len(problems), TOKENS)).split((DIGITS, TOKENS), dim=-1)
    digit_loss = cross_entropy(digits[:, LABEL_TOKENS].flatten(0, 1), torch.tensor(problems).flatten())
    return digit_loss + cross_entropy(places.flatten(0, 1), torch.arange(TOKENS).repeat(len(problems)))


def answer_loss(model: Any, processor: Any, shown: Demonstrations, rng: Random) -> Tensor:
    """Mean over the tokens of the responses, their end included."""
    inputs = encoded(processor, shown, rng)
    is_answer = inputs["attention_mask"].bool()
    is_answer[:, : prompt_length(processor, shown[0][0])] = False
    labels = inputs["input_ids"].masked_fill(~is_answer, IGNORED)
    return model(**inputs, labels=labels, use_cache=False).loss


def prompt_length(processor: Any, sides: Sides) -> int:
    """In tokens, the same for every problem."""
    return encoded(processor, [(sides, "")], Random(0))["input_ids"].shape[1] - 1  # END follows


def encoded(processor: Any, shown: Demonstrations, rng: Random) -> Any:
    """Token ids and pixels, as the model takes them; padded on the right."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    pictures = [draw(sides, rng) for sides, _ in shown]
    texts = [f"{prompt}{response}{END}" for _, response in shown]
    return processor(text=texts, images=pictures, padding=True, padding_side="right", return_tensors="pt")
