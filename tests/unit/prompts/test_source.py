import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_mcore.prompts.source import PromptSource
from dapo_mcore.types import Prompt


def prompts(count: int, first_token: int = 0) -> list[Prompt]:
    return [Prompt(i, 10 + i, (first_token + i,), f"q{i}", f"a{i}") for i in range(count)]


def rows(drawn: list[Prompt]) -> list[int]:
    return [prompt.row - 10 for prompt in drawn]


def enumerate_by_hand(count: int, seed: int, epochs: int) -> list[int]:
    """The order as it is documented: rows of an epoch sorted by one random() each."""
    stream = []
    for epoch in range(epochs):
        draw = random.Random(f"{seed}/{epoch}")
        pairs = [(draw.random(), row) for row in range(count)]
        stream += [row for _, row in sorted(pairs)]
    return stream


def test_the_stream_is_the_documented_order_over_epochs():
    source = PromptSource(prompts(7), seed=3)
    assert rows(source.peek(0, 35)) == enumerate_by_hand(7, seed=3, epochs=5)


def test_the_order_is_the_same_on_every_machine():
    """Written down once; another Python must draw the same."""
    assert rows(PromptSource(prompts(8), seed=0).peek(0, 16)) == [0, 3, 7, 4, 1, 5, 2, 6, 6, 3, 1, 2, 0, 4, 5, 7]


def test_each_epoch_holds_every_prompt_once_in_an_order_of_its_own():
    source = PromptSource(prompts(50), seed=1)
    epochs = [tuple(rows(source.peek(50 * e, 50))) for e in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len(set(epochs)) == 4
    assert epochs[0] != tuple(rows(PromptSource(prompts(50), seed=2).peek(0, 50)))


def test_without_shuffling_rows_come_in_order_for_ever():
    assert rows(PromptSource(prompts(3), seed=0, shuffle=False).peek(2, 5)) == [2, 0, 1, 2, 0]


def test_a_uid_is_the_position_and_never_used_twice():
    source = PromptSource(prompts(4), seed=0)
    assert [p.uid for p in source.peek(0, 11)] == list(range(11))


def test_peeking_does_not_consume():
    source = PromptSource(prompts(5), seed=0)
    first = source.peek(0, 3)
    source.peek(100, 20)
    assert source.position == 0
    assert source.peek(0, 3) == first


@given(
    count=st.integers(1, 9),
    steps=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12), st.booleans()), max_size=12),
)
def test_consumption_with_any_speculation_and_any_resume_reads_each_position_once(count, steps):
    source, consumed = PromptSource(prompts(count), seed=5), []
    for take, ahead, resume in steps:
        consumed += source.peek(source.position, take + ahead)[:take]
        source.commit(source.position + take)
        if resume:
            state, source = source.state(), PromptSource(prompts(count), seed=5)
            source.load_state(state)
    expected = enumerate_by_hand(count, seed=5, epochs=len(consumed) // count + 1)
    assert rows(consumed) == expected[: len(consumed)]
    assert [p.uid for p in consumed] == list(range(len(consumed)))


def test_the_stream_does_not_go_back():
    source = PromptSource(prompts(5), seed=0)
    source.commit(4)
    with pytest.raises(ValueError, match="consumed"):
        source.commit(3)


@pytest.mark.parametrize(
    ("other", "option"),
    [
        (PromptSource(prompts(6), seed=0), "data.train"),
        (PromptSource(prompts(5, first_token=1), seed=0), "data.train"),
        (PromptSource(prompts(5), seed=1), "trainer.seed"),
        (PromptSource(prompts(5), seed=0, shuffle=False), "data.shuffle"),
    ],
)
def test_the_state_of_another_stream_is_refused_by_the_option_that_differs(other, option):
    source = PromptSource(prompts(5), seed=0)
    source.commit(3)
    with pytest.raises(ValueError, match=f"{option}: the checkpoint's prompt stream"):
        other.load_state(source.state())
    assert other.position == 0


def test_a_stream_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no prompts"):
        PromptSource([], seed=0)
