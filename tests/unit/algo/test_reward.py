import math
from functools import partial

import pytest
import torch

from dapo_mcore.algo.reward import overlong_penalty, shaped_rewards
from dapo_mcore.types import FinishReason, Group, Prompt, Response, Sample, Verdict


@pytest.mark.parametrize(
    ("length", "penalty"),
    [
        (0, 0.0),
        (16_384, 0.0),
        (16_385, -1 / 4_096),
        (18_432, -0.5),
        (20_480, -1.0),
        (30_000, -1.0),  # tokens beyond the limit cost no more
    ],
)
@pytest.mark.parametrize("factor", [1.0, 0.5, 0.0])
def test_the_length_term_falls_linearly_over_the_buffer_and_stays_at_minus_factor(length, penalty, factor):
    assert overlong_penalty(torch.tensor([length]), 20_480, 4_096, factor).tolist() == [penalty * factor]


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_the_length_term_is_the_one_of_verl(oracle, factor):
    verl = oracle("verl")
    ours = 1.0 + overlong_penalty(verl["input.overlong.lengths"], 64, 16, factor)
    torch.testing.assert_close(ours, verl[f"overlong.factor{factor:g}"], rtol=0, atol=1e-7)


def test_the_length_term_is_added_to_the_score_and_counts_response_tokens_alone():
    def sample(score: float, length: int) -> Sample:
        response = Response((7,) * length, (-0.1,) * length, "", FinishReason.STOP, 0)
        return Sample(response, Verdict(accuracy=(score + 1) / 2, score=score))

    prompt = Prompt(0, 0, token_ids=(1,) * 50, text="", answer="")
    group = Group(prompt, (sample(1.0, 64), sample(-1.0, 64), sample(1.0, 48), sample(-1.0, 57)))
    penalty = partial(overlong_penalty, max_response_length=64, buffer_len=16, penalty_factor=1.0)
    assert shaped_rewards(group, penalty).tolist() == [0.0, -2.0, 1.0, -1.5625]
    assert shaped_rewards(group, torch.zeros_like).tolist() == [1.0, -1.0, 1.0, -1.0]


def test_a_score_that_is_no_number_stays_visible():
    response = Response((7,), (-0.1,), "", FinishReason.STOP, 0)
    group = Group(Prompt(0, 0, (1,), "", ""), (Sample(response, Verdict(0.0, math.nan)),))
    assert shaped_rewards(group, torch.zeros_like).isnan().all()
