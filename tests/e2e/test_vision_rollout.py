"""Prompts with pictures in live vLLM engines, against transformers, before and after their weights are replaced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from dapo_mcore.config import RayConfig
from dapo_mcore.rollout.engine import Request, Sampling, generate
from dapo_mcore.rollout.ray_engine import EngineArguments
from dapo_mcore.rollout.ray_pool import RayPool
from dapo_mcore.rollout.vllm_engine import VllmEngine
from dapo_mcore.types import FinishReason, Response
from tests.e2e.tiny_policies import model_config, rollout_config, weights_in
from tests.e2e.tiny_vl_policies import (
    CELL,
    IMAGE,
    LENGTHS,
    PROMPT_LENGTH,
    RESPONSE_LENGTH,
    gap,
    image_tokens,
    picture,
    prompt_of,
    requests_of,
    save_vl_policy,
    some_prompts,
    tokenizer,
    vl_policy,
)

SAMPLING = Sampling(temperature=1.0, max_tokens=RESPONSE_LENGTH)
TOLERANCE = 2e-5  # nats, float32
WRONG = 0.05  # nats; another tower's features are off by more


@dataclass(frozen=True)
class Policies:
    """An engine that was started with the first of two policies, which differ in their towers alone."""

    engine: VllmEngine
    models: list[Any]
    folders: list[Path]
    requests: list[Request]
    fresh: list[Response]  # to `requests`, before anything was pushed

    def generate(self) -> list[Response]:
        return generate(self.engine, self.requests, SAMPLING)

    def push(self, number: int) -> None:
        self.engine.load(weights_in(self.folders[number]), number)


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Policies]:
    models = [vl_policy(tower=0), vl_policy(tower=1)]
    folders = [save_vl_policy(model, tmp_path_factory.mktemp("policy")) for model in models]
    vision = image_tokens(folders[0])
    engine = VllmEngine(model_config(folders[0]), rollout_config(), tokenizer(), vision=vision, **LENGTHS)
    wanted = requests_of(some_prompts(vision), 4)
    try:
        yield Policies(engine, models, folders, wanted, generate(engine, wanted, SAMPLING))
    finally:
        engine.close()


@pytest.fixture(scope="module")
def pool(policies: Policies) -> Iterator[RayPool]:
    """Two engines in Ray actors, which were started with the second of the policies."""
    folder = policies.folders[1]
    model, vision = model_config(folder), image_tokens(folder)
    arguments = EngineArguments(model, rollout_config(), tokenizer(), *LENGTHS.values(), False, vision)
    pool = RayPool(RayConfig(num_engines=2, object_store_mb=80, max_replacements=0), arguments)
    yield pool
    pool.close()


def unversioned(responses: list[Response]) -> list[Response]:
    return [replace(response, version=0) for response in responses]


def test_responses_to_text_and_to_pictures_have_the_log_probabilities_of_transformers(policies: Policies) -> None:
    assert gap(policies.models[0], policies.requests, policies.fresh) <= TOLERANCE
    with_pads = [q for q, r in zip(policies.requests, policies.fresh, strict=True) if IMAGE in r.token_ids[:-1]]
    assert any(request.prompt.images for request in with_pads), "no placeholder was sampled and read again"


def test_a_cut_response_goes_on_behind_its_pictures(policies: Policies) -> None:
    partials = [
        replace(r, token_ids=r.token_ids[:cut], logprobs=r.logprobs[:cut], finish_reason=FinishReason.ABORTED)
        for r in policies.fresh
        for cut in [r.token_ids.index(IMAGE) + 1 if IMAGE in r.token_ids[:20] else 5]
    ]
    onward = [replace(q, partial=partial) for q, partial in zip(policies.requests, partials, strict=True)]
    responses = generate(policies.engine, onward, SAMPLING)
    assert gap(policies.models[0], onward, responses) <= TOLERANCE
    assert [r.token_ids[: len(p.token_ids)] for r, p in zip(responses, partials, strict=True)] == [
        partial.token_ids for partial in partials
    ]


def test_nothing_of_an_old_tower_is_used_after_a_push(policies: Policies) -> None:
    assert gap(policies.models[1], policies.requests, policies.fresh) > WRONG, "the towers differ too little to tell"
    policies.push(1)
    assert gap(policies.models[1], policies.requests, policies.generate()) <= TOLERANCE
    policies.engine.submit(policies.requests, SAMPLING)  # the same pictures are on their way when the next push comes
    policies.engine.poll()
    assert policies.engine.abort([request.key for request in policies.requests])
    policies.push(0)
    assert unversioned(policies.generate()) == unversioned(policies.fresh)


def test_engines_in_ray_actors_see_what_one_in_this_process_does_after_every_push(
    policies: Policies, pool: RayPool
) -> None:
    assert {len(request.prompt.images) for request in policies.requests} == {0, 1, 2}
    pool.load(weights_in(policies.folders[0]), 1)
    first = generate(pool, policies.requests, SAMPLING)
    assert unversioned(first) == unversioned(policies.fresh)
    assert gap(policies.models[1], policies.requests, first) > WRONG
    pool.load(weights_in(policies.folders[1]), 2)
    assert gap(policies.models[1], policies.requests, generate(pool, policies.requests, SAMPLING)) <= TOLERANCE


def test_prompts_of_which_the_engine_would_make_other_tokens_are_refused_by_name(policies: Policies) -> None:
    other = prompt_of(image_tokens(policies.folders[0], max_pixels=6 * CELL**2), 7, picture(61, 47, 2))
    with pytest.raises(
        ValueError,
        match=r"prompt 7 \(row 7\): the engine reads 35 tokens and .* trained on 30, which differ from token 17 on: "
        r".* 1 pictures .* data\.max_pixels",
    ):
        generate(policies.engine, requests_of([other], 1), SAMPLING)
    policies.engine.clear()


def test_a_prompt_is_as_long_as_its_text_and_pictures_together(policies: Policies) -> None:
    large = [picture(61, 47, seed) for seed in range(13)]
    long = prompt_of(image_tokens(policies.folders[0]), 8, *large, length=1)
    assert len(long.token_ids) < PROMPT_LENGTH
    with pytest.raises(ValueError, match=r"prompt 8 \(row 8\) has 157 tokens, above data\.max_prompt_length=150"):
        generate(policies.engine, requests_of([long], 1), SAMPLING)


def test_both_ends_of_the_cache_of_pictures_agree_again_after_a_failure(policies: Policies) -> None:
    good = prompt_of(image_tokens(policies.folders[0]), 9, picture(40, 40, 5))
    # vLLM puts the picture into its cache, and then finds no place for it among the tokens
    broken = replace(good, token_ids=tuple(1 if token == IMAGE else token for token in good.token_ids), visual_spans=())
    with pytest.raises(AssertionError, match="Failed to apply prompt replacement"):
        generate(policies.engine, requests_of([broken], 1), SAMPLING)
    policies.engine.clear()
    wanted = requests_of([good], 1)
    assert gap(policies.models[0], wanted, generate(policies.engine, wanted, SAMPLING)) <= TOLERANCE
