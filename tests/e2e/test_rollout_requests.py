"""What a request gets from the in-process vLLM engine: its own random stream, exact log-probabilities, a clean end."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from dapo_mcore.rollout.engine import Request, Sampling, generate
from dapo_mcore.rollout.vllm_engine import VllmEngine
from dapo_mcore.types import FinishReason
from tests.e2e.tiny_policies import (
    EOS,
    PROMPT_LENGTH,
    RESPONSE_LENGTH,
    Letters,
    logprob_error,
    prompts,
    requests,
    response_logits,
    sampled,
    save_policy,
    started,
)

SAMPLING = Sampling(temperature=1.0, max_tokens=RESPONSE_LENGTH)
TOLERANCE = 2e-5  # nats, float32


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[VllmEngine, torch.nn.Module]]:
    folder = tmp_path_factory.mktemp("policy")
    model = save_policy(folder, "qwen3_moe", 0)
    with started(folder) as engine:
        yield engine, model


def test_responses_do_not_depend_on_order_nor_on_company(policy: tuple[VllmEngine, torch.nn.Module]) -> None:
    engine, _ = policy
    wanted = requests(4, 4, length=20)
    together = generate(engine, wanted, SAMPLING)
    order = list(range(len(wanted)))
    random.Random(3).shuffle(order)
    permuted = generate(engine, [wanted[i] for i in order], SAMPLING)
    assert permuted == [together[i] for i in order]
    assert [generate(engine, [request], SAMPLING)[0] for request in wanted] == together


def test_samples_of_a_prompt_differ(policy: tuple[VllmEngine, torch.nn.Module]) -> None:
    engine, _ = policy
    assert len({r.token_ids for r in generate(engine, requests(1, 16), SAMPLING)}) == 16


def test_logprobs_are_those_of_the_tempered_distribution(policy: tuple[VllmEngine, torch.nn.Module]) -> None:
    engine, model = policy
    wanted = requests(3, 2)
    for request, response in zip(wanted, generate(engine, wanted, Sampling(0.7, RESPONSE_LENGTH)), strict=True):
        expected = sampled((response_logits(model, request, response) / 0.7).log_softmax(-1), response)
        torch.testing.assert_close(torch.tensor(response.logprobs).double(), expected, atol=TOLERANCE, rtol=0)


def test_logprobs_are_those_of_the_nucleus_when_top_p_cuts(policy: tuple[VllmEngine, torch.nn.Module]) -> None:
    engine, model = policy
    wanted = requests(3, 2)
    for request, response in zip(
        wanted, generate(engine, wanted, Sampling(1.0, RESPONSE_LENGTH, top_p=0.6)), strict=True
    ):
        probabilities, order = response_logits(model, request, response).softmax(-1).sort(-1, descending=True)
        before = probabilities.cumsum(-1) - probabilities
        kept = torch.where(before < 0.6, probabilities, 0.0)
        nucleus = torch.zeros_like(kept).scatter(-1, order, kept / kept.sum(-1, keepdim=True))
        expected = sampled(nucleus.log(), response)
        torch.testing.assert_close(torch.tensor(response.logprobs).double(), expected, atol=TOLERANCE, rtol=0)


def test_temperature_zero_takes_the_likeliest_token(policy: tuple[VllmEngine, torch.nn.Module]) -> None:
    engine, model = policy
    wanted = requests(2, 1)
    responses = generate(engine, wanted, Sampling(0.0, RESPONSE_LENGTH))
    for request, response in zip(wanted, responses, strict=True):
        assert response_logits(model, request, response).argmax(-1).tolist() == list(response.token_ids)
    assert logprob_error(model, wanted, responses) <= TOLERANCE


def test_a_response_ends_with_the_end_token_or_at_its_length(policy: tuple[VllmEngine, torch.nn.Module]) -> None:
    engine, _ = policy
    responses = generate(engine, requests(16, 8, length=5), SAMPLING)
    assert {r.finish_reason for r in responses} == {FinishReason.STOP, FinishReason.LENGTH}
    for response in responses:
        ended = response.finish_reason is FinishReason.STOP
        assert [token == EOS for token in response.token_ids] == [False] * (len(response.token_ids) - ended) + [
            True
        ] * ended
        assert ended or len(response.token_ids) == RESPONSE_LENGTH
        assert len(response.logprobs) == len(response.token_ids)
        assert response.text == Letters().decode(response.token_ids, skip_special_tokens=True)


def test_an_aborted_response_goes_on_where_it_was_and_disturbs_no_other(
    policy: tuple[VllmEngine, torch.nn.Module],
) -> None:
    engine, model = policy
    wanted = requests(6, 4, length=20)
    whole = dict(zip((q.key for q in wanted), generate(engine, wanted, SAMPLING), strict=True))
    engine.submit(wanted, SAMPLING)
    early = engine.poll()
    gone = {request.key for request in wanted[::2]} - {finished.request.key for finished in early}
    cut = engine.abort(gone)
    assert engine.abort(gone) == []
    late = [finished for _ in range(RESPONSE_LENGTH) for finished in engine.poll()]
    kept = {finished.request.key: finished.response for finished in early + late}
    assert kept == {key: response for key, response in whole.items() if key not in gone}
    assert 0 < len(cut) <= len(gone)
    for finished in cut:
        response, uninterrupted = finished.response, whole[finished.request.key]
        assert response.finish_reason is FinishReason.ABORTED
        assert 0 < len(response.token_ids) == len(response.logprobs) < len(uninterrupted.token_ids)
        assert response.token_ids == uninterrupted.token_ids[: len(response.token_ids)]
    onward = [replace(one.request, seed=one.request.seed + 1, partial=one.response) for one in cut]
    responses = generate(engine, onward, SAMPLING)
    assert logprob_error(model, onward, responses) <= TOLERANCE
    for request, response in zip(onward, responses, strict=True):
        assert request.partial is not None
        before = len(request.partial.token_ids)
        assert response.token_ids[:before] == request.partial.token_ids
        assert before < len(response.token_ids) <= RESPONSE_LENGTH
        assert response.continued == ((before, engine.version),)
        assert response.text == Letters().decode(response.token_ids, skip_special_tokens=True)


def test_overlong_requests_are_refused_by_name(policy: tuple[VllmEngine, torch.nn.Module]) -> None:
    engine, _ = policy
    long = prompts(3, PROMPT_LENGTH + 1)[2]
    with pytest.raises(ValueError, match=r"prompt 2 \(row 2\) has 151 tokens, above data\.max_prompt_length=150"):
        generate(engine, [Request(long, 0, 1)], SAMPLING)
    with pytest.raises(ValueError, match=r"25 response tokens .* data\.max_response_length=24"):
        generate(engine, requests(1, 1), Sampling(1.0, RESPONSE_LENGTH + 1))
