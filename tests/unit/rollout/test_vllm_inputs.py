"""What goes to an engine and back for prompts with pictures, without an engine."""

import pickle
from dataclasses import replace

import pytest

from dapo_mcore.rollout.engine import Finished, Request
from dapo_mcore.rollout.vllm_inputs import prompt_for, refuse_other_tokens, refuse_prompts
from dapo_mcore.types import EncodedImage, FinishReason, Prompt, Response, VisualSpan

IMAGE = 9
PICTURE_BYTES = 200_000
PROMPT = Prompt(
    uid=4,
    row=2,
    token_ids=(5, IMAGE, 6),
    text="",
    answer="",
    images=(EncodedImage(bytes(range(250)) * (PICTURE_BYTES // 250), 64, 32),),
    visual_spans=(VisualSpan(1, 1, 2),),
)
PARTIAL = Response((7, IMAGE), (-1.0, -2.0), "", FinishReason.ABORTED, 0)


def test_an_engine_gets_one_placeholder_per_picture_and_the_sampled_tokens_as_they_are():
    decoded = object()
    given = prompt_for(Request(PROMPT, 0, seed=1, partial=PARTIAL), lambda image: decoded)  # type: ignore[arg-type]
    assert given == {"prompt_token_ids": [5, IMAGE, 6, 7, IMAGE], "multi_modal_data": {"image": [decoded]}}
    text = replace(PROMPT, token_ids=(5, 6), images=(), visual_spans=())
    assert prompt_for(Request(text, 0, seed=1), EncodedImage.decode) == {"prompt_token_ids": [5, 6]}


def test_the_engines_tokens_are_compared_with_the_expanded_prompt_and_what_was_sampled():
    request = Request(PROMPT, 0, seed=1, partial=PARTIAL)
    refuse_other_tokens(request, [5, IMAGE, IMAGE, 6, 7, IMAGE])
    others = (
        ([5, IMAGE, IMAGE, IMAGE, 6, 7, IMAGE], 3),
        ([5, IMAGE, IMAGE, 6, 7], 5),
        ([5, IMAGE, IMAGE, 6, 8, IMAGE], 4),
    )
    for tokens, first in others:
        with pytest.raises(
            ValueError, match=f"reads {len(tokens)} tokens and .* on 6, which differ from token {first} "
        ):
            refuse_other_tokens(request, tokens)


def test_pictures_for_a_model_of_text_are_refused_by_name():
    with pytest.raises(ValueError, match=r"prompt 4 \(row 2\) has 1 pictures, but model\.path is a text model"):
        refuse_prompts([PROMPT], max_prompt_length=10, sees=False)
    refuse_prompts([PROMPT], max_prompt_length=4, sees=True)
    with pytest.raises(ValueError, match=r"prompt 4 \(row 2\) has 4 tokens, above data\.max_prompt_length=3"):
        refuse_prompts([PROMPT], max_prompt_length=3, sees=True)


def test_a_picture_travels_once_for_all_responses_to_its_prompt_and_never_back():
    dealt = [Request(PROMPT, index, seed=index) for index in range(16)]
    sent = pickle.dumps(dealt)
    assert PICTURE_BYTES < len(sent) < 1.02 * PICTURE_BYTES
    assert len({id(request.prompt.images[0]) for request in pickle.loads(sent)}) == 1
    answers = [Finished(request, PARTIAL).answer for request in dealt]
    assert len(pickle.dumps(answers)) < 0.01 * PICTURE_BYTES
