"""Positions and places of visual tokens: numbers by hand, and transformers' own count."""

from __future__ import annotations

import pytest
import torch

from dapo_mcore.actor.packing import Cut, pack
from dapo_mcore.actor.vision.inputs import vision_inputs
from dapo_mcore.actor.vision.positions import InterleavedRope, mrope_positions
from dapo_mcore.types import Visual, VisualSpan
from tests.tiny_vl import IMAGE, MERGE, VOCAB, tiny_vl
from tests.vision_packs import SAME, mixed_batch

CPU = torch.device("cpu")
# length, (first token, rows, columns) of each image
SHOWN = [
    (7, []),
    (20, [(3, 2, 4)]),
    (22, [(0, 4, 2), (9, 3, 4)]),
    (30, [(2, 1, 5), (12, 3, 3)]),
]


def visual(start: int, rows: int, columns: int) -> Visual:
    pixels = torch.full((rows * columns * MERGE**2, 6), float(start))
    return Visual(lambda: pixels, VisualSpan(start, rows, columns))


def test_an_image_stands_still_in_time_and_text_goes_on_behind_its_longer_side() -> None:
    """Two tokens of text, an image of 2 x 3, text."""
    assert mrope_positions(10, [VisualSpan(2, 2, 3)]).tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


@pytest.mark.parametrize("video", [False, True])
@pytest.mark.parametrize(("length", "spans"), SHOWN)
def test_positions_are_those_of_transformers_for_images_and_for_frames_of_a_video(length, spans, video) -> None:
    """Frames of one video have one size; here each is a video of one frame, with text between them."""
    model = tiny_vl("qwen3_vl")
    kinds, ids = torch.zeros(1, length, dtype=torch.int), torch.randint(IMAGE + 1, VOCAB, (1, length))
    for start, rows, columns in spans:
        kinds[0, start : start + rows * columns] = 2 if video else 1
    grids = torch.tensor([(1, rows * MERGE, columns * MERGE) for _, rows, columns in spans]) if spans else None
    named = {"video_grid_thw" if video else "image_grid_thw": grids}
    wanted, _ = model.model.get_rope_index(ids, mm_token_type_ids=kinds, **named)
    assert torch.equal(mrope_positions(length, [VisualSpan(*span) for span in spans]), wanted[:, 0])


def test_frames_of_a_video_count_like_images() -> None:
    """Two frames of 2 x 2 with a timestamp of three tokens before each."""
    model = tiny_vl("qwen3_vl")
    kinds = torch.tensor([[0, 0, 0, 2, 2, 2, 2, 0, 0, 0, 2, 2, 2, 2, 0]], dtype=torch.int)
    grids = torch.tensor([(2, 2 * MERGE, 2 * MERGE)])
    wanted, _ = model.model.get_rope_index(kinds.long(), mm_token_type_ids=kinds, video_grid_thw=grids)
    assert torch.equal(mrope_positions(15, [VisualSpan(3, 2, 2), VisualSpan(10, 2, 2)]), wanted[:, 0])


def test_frequencies_turn_in_turn_with_time_row_and_column() -> None:
    rope = InterleavedRope(16, 100.0, [4, 3, 1])
    angles = rope(torch.tensor([[[1000]], [[10]], [[1]]]))
    turned = angles[0, 0, 0, :8] / (100.0 ** -(torch.arange(8) / 8))
    assert turned.round().tolist() == [1000, 10, 1, 1000, 10, 1000, 1000, 10]
    assert torch.equal(angles[..., :8], angles[..., 8:])


def test_an_image_that_two_sequences_show_is_held_once_and_its_tokens_are_found_in_both() -> None:
    first = visual(1, 1, 2)
    again = Visual(first.make, VisualSpan(2, 1, 2))
    found = vision_inputs([(first,), (), (again,)], [0, 4, 7, 12, 16], torch.arange(16), CPU)
    assert found.sizes.tolist() == [[1, 2]]
    assert [id(pixels) for pixels in found.images] == [id(first.pixels)]
    assert found.where.tolist() == [1, 2, 9, 10]
    assert found.features.tolist() == [0, 1, 0, 1]
    assert found.positions[0].tolist() == [0, 1, 1, 3, 0, 1, 2, 0, 1, 2, 2, 4, 0, 1, 2, 3]


def test_images_of_a_sequence_are_counted_one_after_the_other() -> None:
    found = vision_inputs([(), (visual(1, 1, 2), visual(4, 2, 2))], [0, 3, 12], torch.arange(12), CPU)
    assert found.sizes.tolist() == [[1, 2], [2, 2]]
    assert found.where.tolist() == [4, 5, 7, 8, 9, 10]
    assert found.features.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_pack_of_text_counts_up_and_shows_nothing() -> None:
    found = vision_inputs([(), ()], [0, 3, 5], torch.arange(5), CPU)
    assert found.positions.tolist() == [[0, 1, 2, 0, 1]] * 3
    assert len(found.where) == len(found.features) == len(found.sizes) == len(found.images) == 0


def test_context_ranks_know_the_whole_pack_and_which_of_its_tokens_they_hold() -> None:
    batch = mixed_batch()
    ranks = [pack(batch, [0, 1], batch.loss_mask, Cut(2, rank), CPU) for rank in range(2)]
    for rank in ranks:
        assert rank.vision.positions.shape == (3, 48)
        assert rank.vision.where.tolist() == [*range(23, 31)]
    assert sorted(torch.cat([rank.vision.held for rank in ranks]).tolist()) == [*range(48)]
    whole = pack(batch, [0, 1], batch.loss_mask, Cut(), CPU)
    for rank in ranks:
        assert torch.equal(whole.input_ids[0][rank.vision.held], rank.input_ids[0])


def test_selected_responses_keep_their_images() -> None:
    batch = mixed_batch()
    assert batch.visuals is not None
    chosen = batch.select([2, 0, 2]).visuals
    assert chosen is not None
    assert [[v.span.start for v in shown] for shown in chosen] == [[2, 11], [], [2, 11]]
    assert batch.select(SAME).visuals == (batch.visuals[SAME[0]],) * 2
