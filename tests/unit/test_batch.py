import math
import pickle
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from dapo_mcore.batch import make_batch, shuffle, with_kl_in_rewards
from dapo_mcore.config import (
    AdvEstimator,
    AlgorithmConfig,
    DataConfig,
    KlCtrlConfig,
    KlEstimator,
    OverlongBufferConfig,
    RewardConfig,
)
from dapo_mcore.prompts import PromptSource
from dapo_mcore.rollout.collected import Collected
from dapo_mcore.types import (
    EncodedImage,
    FinishReason,
    Group,
    Outcome,
    Prompt,
    Response,
    Sample,
    TrainBatch,
    Verdict,
    VisualSpan,
)

DATA = DataConfig(max_response_length=8)
NO_LENGTH_TERM = RewardConfig(overlong_buffer=OverlongBufferConfig(enable=False, len=0))
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


def sample(
    token_ids: tuple[int, ...], score: float, finish: FinishReason = STOP, outcome: Outcome = Outcome.GRADED
) -> Sample:
    logprobs = tuple(-0.01 * token for token in token_ids)
    return Sample(Response(token_ids, logprobs, "", finish, 0), Verdict((score + 1) / 2, score, outcome))


def group(uid: int, prompt: tuple[int, ...], *samples: Sample) -> Group:
    return Group(Prompt(uid, uid, prompt, "", ""), samples)


# scores +1, -1, -1, -1: advantages 1.5 and -0.5, their unbiased deviation being 1
FIRST = group(
    0, (1, 2), sample((11, 12), 1.0), sample((13,), -1.0), sample((14, 15, 16), -1.0, LENGTH), sample((17,), -1.0)
)
SECOND = group(
    1, (3,), sample((21,), -1.0), sample((22, 23), -1.0), sample((24,), 1.0), sample((25, 26, 27, 28), -1.0, LENGTH)
)


def batch_of(*groups: Group, reward: RewardConfig = NO_LENGTH_TERM, **algorithm: object) -> TrainBatch:
    return make_batch(groups, AlgorithmConfig(**algorithm), reward, DATA)


def rows(batch: TrainBatch) -> list[tuple[list, ...]]:
    """The batch response by response."""
    lengths, totals = batch.response_lengths.tolist(), (batch.prompt_lengths + batch.response_lengths).tolist()
    per_token = [x.split(lengths) for x in (batch.loss_mask, batch.advantages, batch.rollout_logprobs)]
    return [tuple(x.tolist() for x in row) for row in zip(batch.token_ids.split(totals), *per_token, strict=True)]


def response_advantages(batch: TrainBatch) -> list[float]:
    return [advantages[0] for _, _, advantages, _ in rows(batch)]


def test_responses_lie_flat_behind_their_prompts_in_the_order_of_the_groups():
    batch = batch_of(FIRST, SECOND)
    assert batch.token_ids.tolist()[:8] == [1, 2, 11, 12, 1, 2, 13, 1]
    assert batch.prompt_lengths.tolist() == [2, 2, 2, 2, 1, 1, 1, 1]
    assert batch.response_lengths.tolist() == [2, 1, 3, 1, 1, 2, 1, 4]
    responses = torch.tensor([11, 12, 13, 14, 15, 16, 17, 21, 22, 23, 24, 25, 26, 27, 28])
    torch.testing.assert_close(batch.rollout_logprobs, -0.01 * responses)
    assert [t for tokens, *_ in rows(batch) for t in tokens if t > 10] == responses.tolist()


def test_a_picture_is_made_once_for_all_responses_and_prompts_that_show_it():
    red, blue = EncodedImage(b"red", 8, 8), EncodedImage(b"blue", 8, 4)
    equal = EncodedImage(bytes(bytearray(b"red")), 8, 8)  # read from another row
    shown = {
        0: ((1, 9, 2), (red,), (VisualSpan(1, 2, 2),)),
        1: ((3,), (), ()),
        2: ((9, 4, 9), (blue, equal), (VisualSpan(0, 1, 2), VisualSpan(3, 2, 2))),
    }
    samples = sample((11, 12), 1.0), sample((9,), -1.0)
    groups = [Group(Prompt(uid, uid, ids, "", "", {}, *seen), samples) for uid, (ids, *seen) in shown.items()]
    made: list[EncodedImage] = []

    def pixels_of(image: EncodedImage) -> torch.Tensor:
        made.append(image)
        return torch.full((4, 3), float(len(made)))

    batch = make_batch(groups, AlgorithmConfig(), NO_LENGTH_TERM, DATA, pixels_of)
    assert made == [], "other ranks may be the ones that compute on a picture"
    assert batch.prompt_lengths.tolist() == [6, 6, 1, 1, 7, 7]
    assert [tokens for tokens, *_ in rows(batch)][::2] == [
        [1, 9, 9, 9, 9, 2, 11, 12], [3, 11, 12], [9, 9, 4, 9, 9, 9, 9, 11, 12],
    ]  # fmt: skip
    assert batch.visuals is not None
    first, again, *text, third, _ = batch.visuals
    assert first is again
    assert text == [(), ()]
    assert [visual.span for visual in third] == list(shown[2][2])
    assert third[1].pixels is first[0].pixels
    assert made == [red]
    assert [visual.pixels[0, 0].item() for visual in third] == [2.0, 1.0]
    assert made == [red, blue]


def test_what_rank_0_hands_to_the_others_holds_each_picture_once_and_encoded():
    image = EncodedImage(Random(0).randbytes(100_000), 500, 500)
    row = Prompt(0, 0, (1, 9), "", "", images=(image,), visual_spans=(VisualSpan(1, 16, 16),))
    source = PromptSource([row], seed=0)  # two epochs of one row
    groups = tuple(Group(prompt, (sample((11,), 1.0),) * 8) for prompt in source.peek(0, 2))
    collected = Collected(groups, considered=groups)
    assert len(pickle.dumps(collected)) < 1.1 * len(image.data)


def test_a_batch_of_text_shows_nothing():
    assert batch_of(FIRST).visuals is None


def test_every_field_has_its_documented_type():
    batch = batch_of(FIRST)
    assert {name: getattr(batch, name).dtype for name in ("token_ids", "prompt_lengths", "response_lengths")} == (
        dict.fromkeys(("token_ids", "prompt_lengths", "response_lengths"), torch.int64)
    )
    assert batch.loss_mask.dtype == torch.bool
    assert batch.advantages.dtype == batch.rollout_logprobs.dtype == torch.float32
    assert batch.old_logprobs is None


def test_all_tokens_of_a_response_share_the_advantage_over_its_own_group():
    expected = [[1.5] * 2, [-0.5], [-0.5] * 3, [-0.5], [-0.5], [-0.5] * 2, [1.5], [-0.5] * 4]
    for (_, _, advantages, _), wanted in zip(rows(batch_of(FIRST, SECOND)), expected, strict=True):
        assert advantages == pytest.approx(wanted, rel=2e-6)


def test_the_length_term_moves_the_advantage():
    reward = RewardConfig(overlong_buffer=OverlongBufferConfig(len=4, penalty_factor=1.0))
    pair = group(0, (1,), sample((5,) * 4, 1.0), sample((6,) * 6, 1.0), sample((7,) * 8, 1.0))
    batch = batch_of(pair, reward=reward, norm_adv_by_std_in_grpo=False)  # rewards 1, 0.5, 0
    assert response_advantages(batch) == [0.5, 0.0, -0.5]


def test_the_population_deviation_is_used_when_asked_for():
    expected = [math.sqrt(3), *[-1 / math.sqrt(3)] * 3]
    assert response_advantages(batch_of(FIRST, std_ddof=0)) == pytest.approx(expected, rel=2e-6)


def test_overlong_filtering_masks_truncated_responses_that_still_count_in_the_mean():
    plain, filtered = batch_of(FIRST, SECOND), batch_of(FIRST, SECOND, overlong_filtering=True)
    assert plain.loss_mask.all()
    assert [all(mask) for _, mask, _, _ in rows(filtered)] == [True, True, False, True, True, True, True, False]
    assert filtered.advantages.tolist() == plain.advantages.tolist()
    assert (plain.num_loss_tokens, filtered.num_loss_tokens) == (15, 8)


def test_a_mini_batch_may_be_masked_as_a_whole():
    cut = group(0, (1,), sample((5, 6), 1.0, LENGTH), sample((7, 8), -1.0, LENGTH))
    batch = batch_of(cut, overlong_filtering=True)
    assert batch.num_loss_tokens == 0
    assert response_advantages(batch) == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)], rel=2e-6)


@pytest.mark.parametrize("outcome", [Outcome.TIMEOUT, Outcome.ERROR])
def test_a_response_that_could_not_be_graded_neither_trains_nor_moves_the_others(outcome):
    failed = sample((9, 9), math.nan, outcome=outcome)
    batch = batch_of(group(0, (1,), *FIRST.samples, failed))
    assert response_advantages(batch) == pytest.approx([1.5, -0.5, -0.5, -0.5, 0.0], rel=2e-6)
    assert [all(mask) for _, mask, _, _ in rows(batch)] == [True] * 4 + [False]


def test_a_group_of_which_nothing_could_be_graded_does_not_train():
    failed = [sample((9,), 0.0, outcome=Outcome.ERROR)] * 2
    batch = batch_of(group(0, (1,), *failed))
    assert batch.num_loss_tokens == 0
    assert batch.advantages.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_no_finite_number_is_refused_with_its_row(score):
    with pytest.raises(ValueError, match=r"reward\.verifier gave scores .* row 4"):
        batch_of(group(4, (1,), sample((5,), score), sample((6,), 1.0)))


def test_no_groups_make_an_empty_batch_without_updates():
    batch = shuffle(batch_of(), seed=0, step=1)
    assert len(batch) == batch.num_loss_tokens == len(batch.token_ids) == 0
    assert batch.split(8) == []


def large_batch(responses: int = 40) -> TrainBatch:
    chance = torch.Generator().manual_seed(5)
    sizes = torch.randint(1, 9, (responses,), generator=chance).tolist()
    samples = [sample(tuple(range(100 * i, 100 * i + n)), (-1.0) ** i) for i, n in enumerate(sizes)]
    batch = batch_of(*[group(i, (i,) * (1 + i % 3), *samples[i : i + 4]) for i in range(0, responses, 4)])
    return TrainBatch(**{**{f: getattr(batch, f) for f in TrainBatch.__slots__}, "old_logprobs": batch.advantages * 2})


def test_shuffling_moves_whole_responses_with_all_that_belongs_to_them():
    batch = large_batch()
    shuffled = shuffle(batch, seed=1, step=7)
    assert rows(shuffled) != rows(batch)
    assert sorted(rows(shuffled)) == sorted(rows(batch))
    assert torch.equal(shuffled.old_logprobs, 2 * shuffled.advantages)
    assert sorted(zip(shuffled.prompt_lengths.tolist(), rows(shuffled), strict=True)) == sorted(
        zip(batch.prompt_lengths.tolist(), rows(batch), strict=True)
    )


def test_the_order_depends_on_seed_and_step_alone():
    batch = large_batch()
    assert rows(shuffle(batch, seed=1, step=7)) == rows(shuffle(batch, seed=1, step=7))
    orders = {str(rows(shuffle(batch, seed, step))) for seed, step in ((1, 7), (1, 8), (2, 7), (17, 7), (1, 77))}
    assert len(orders) == 5


@pytest.mark.parametrize(
    ("size", "sizes"), [(40, [40]), (64, [40]), (20, [20, 20]), (10, [10] * 4), (32, [20, 20]), (13, [10] * 4)]
)
def test_mini_batches_are_as_few_as_possible_and_even(size, sizes):
    parts = large_batch().split(size)
    assert [len(part) for part in parts] == sizes


@pytest.mark.parametrize("size", [1, 7, 16, 39])
def test_mini_batches_are_the_batch_cut_in_order(size):
    batch = large_batch()
    parts = batch.split(size)
    assert [row for part in parts for row in rows(part)] == rows(batch)
    assert sum(part.num_loss_tokens for part in parts) == batch.num_loss_tokens
    assert max(map(len, parts)) <= size
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_selecting_repeats_and_drops_responses_as_told():
    batch = large_batch()
    assert rows(batch.select([3, 3, 0])) == [rows(batch)[i] for i in (3, 3, 0)]


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [(AdvEstimator.grpo, [1.5, -0.5, -0.5, -0.5]), (AdvEstimator.rloo, [2, -2 / 3, -2 / 3, -2 / 3])],
)
def test_the_estimator_of_the_advantage_is_an_option(estimator: AdvEstimator, expected: list[float]):
    batch = batch_of(FIRST, adv_estimator=estimator)
    assert response_advantages(batch) == pytest.approx(expected, rel=1e-5)


def test_whitening_spans_the_groups_of_the_batch():
    batch = batch_of(FIRST, SECOND, adv_estimator=AdvEstimator.reinforce_plus_plus_baseline)
    trained = batch.advantages[batch.loss_mask].double()
    assert trained.mean().item() == pytest.approx(0, abs=1e-6)
    assert trained.std().item() == pytest.approx(1, rel=1e-5)


def test_rewards_and_groups_follow_their_responses_when_they_are_shuffled():
    ungraded = group(2, (4,), sample((31,), 1.0), sample((32,), 0.0, outcome=Outcome.ERROR))
    batch = shuffle(batch_of(FIRST, ungraded), seed=1, step=2)
    order = shuffle(replace(batch_of(FIRST, ungraded), groups=torch.arange(6)), seed=1, step=2).groups.tolist()
    assert batch.groups.tolist() == [[0, 0, 0, 0, 1, 1][i] for i in order]
    expected = [[1.0, -1.0, -1.0, -1.0, 1.0, math.nan][i] for i in order]
    torch.testing.assert_close(batch.rewards, torch.tensor(expected), equal_nan=True)


def test_the_kl_of_a_response_is_taken_from_its_reward_before_the_advantage():
    batch = shuffle(batch_of(FIRST, SECOND), seed=0, step=1)
    n = len(batch.loss_mask)
    mask = torch.arange(n) % 3 > 0
    old, ref = torch.linspace(-3, -1, n), torch.linspace(-1, -3, n)
    batch = replace(batch, loss_mask=mask, old_logprobs=old, ref_logprobs=ref.masked_fill(~mask, math.nan))
    algorithm = AlgorithmConfig(kl_ctrl=KlCtrlConfig(kl_coef=0.1), kl_penalty=KlEstimator.k2)
    penalised = with_kl_in_rewards(batch, algorithm)
    lengths = batch.response_lengths.tolist()
    kl = [(((o - r)[m]) ** 2 / 2).sum().item() for o, r, m in zip(
        old.split(lengths), ref.split(lengths), mask.split(lengths), strict=True)]  # fmt: skip
    rewards = [r - 0.1 * k for r, k in zip(batch.rewards.tolist(), kl, strict=True)]
    assert penalised.rewards.tolist() == pytest.approx(rewards, rel=1e-5)
    for which in (0, 1):
        members = [i for i in range(8) if batch.groups[i] == which]
        mean = sum(rewards[i] for i in members) / 4
        std = math.sqrt(sum((rewards[i] - mean) ** 2 for i in members) / 3)
        ours = [response_advantages(penalised)[i] for i in members]
        assert ours == pytest.approx([(rewards[i] - mean) / (std + 1e-6) for i in members], rel=1e-4)


def test_the_kl_in_the_reward_is_that_of_verl():
    verl = load_file(Path(__file__).parents[1] / "data" / "oracle" / "verl.safetensors")
    mask, count = verl["input.mask"], len(verl["input.mask"])
    lengths = torch.full((count,), mask.shape[1])
    flat = torch.zeros(mask.numel())
    batch = TrainBatch(
        flat.long(), 0 * lengths, lengths, mask.flatten(), flat, flat, verl["input.old_logprobs"].flatten(),
        verl["input.ref_logprobs"].flatten(), rewards=verl["input.advantages"], groups=torch.arange(count) // 4,
    )  # fmt: skip
    ours = with_kl_in_rewards(batch, AlgorithmConfig(kl_ctrl=KlCtrlConfig(kl_coef=0.05)))
    torch.testing.assert_close(
        ours.advantages.view_as(mask)[:, 0].double(), verl["advantage.kl_in_reward"], rtol=1e-6, atol=1e-7
    )
