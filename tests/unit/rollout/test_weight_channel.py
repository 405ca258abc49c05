"""Weights sent from one sender to several receivers, each in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from dapo_mcore.rollout import weight_channel
from dapo_mcore.rollout.weight_channel import Meeting, Sender, receive

HOST = "127.0.0.1"
PATIENCE_S = 20.0


def weights() -> list[tuple[str, torch.Tensor]]:
    """Sizes that are no multiple of the alignment, dtypes that do not match each other's."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 5), "bias": (1,), "b": (7, 2, 3), "empty": (0, 4), "c": (33,)}
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    return [
        (name, torch.randn(shape, generator=generator).to(dtypes[position % 3]))
        for position, (name, shape) in enumerate(shapes.items())
    ]


Receiver = Callable[[Meeting, int], object]


def push(
    pairs: list[tuple[str, torch.Tensor]], receivers: list[Receiver], timeout_s: float = PATIENCE_S
) -> tuple[Future[None], list[Future[object]]]:
    """What became of the sender and of each receiver."""
    with ThreadPoolExecutor(len(receivers) + 1) as pool:
        sender = Sender(pairs, receivers=len(receivers), host=HOST, timeout_s=timeout_s)
        received = [pool.submit(receiver, sender.meeting, rank) for rank, receiver in enumerate(receivers, 1)]
        return pool.submit(sender.send), received


def take_all(meeting: Meeting, rank: int) -> list[tuple[str, torch.Tensor]]:
    return list(receive(meeting, rank, HOST))


def leave_early(meeting: Meeting, rank: int) -> str:
    """Goes away with the first tensor."""
    return next(receive(meeting, rank, HOST))[0]


@pytest.mark.parametrize("bucket_bytes", [64, 1 << 20])
def test_every_receiver_gets_every_weight_bit_for_bit(bucket_bytes, monkeypatch):
    monkeypatch.setattr(weight_channel, "BUCKET_BYTES", bucket_bytes)
    sent, received = push(weights(), [take_all, take_all])
    sent.result()
    for result in (future.result() for future in received):
        assert [name for name, _ in result] == [name for name, _ in weights()]
        for (_, got), (_, expected) in zip(result, weights(), strict=True):
            assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
            assert torch.equal(got, expected)


def test_a_receiver_that_goes_away_breaks_the_push_for_all_instead_of_hanging(monkeypatch):
    monkeypatch.setattr(weight_channel, "BUCKET_BYTES", 1 << 22)
    large = [(f"w{index}", torch.zeros(1 << 20)) for index in range(8)]
    sent, (left, stayed) = push(large, [leave_early, take_all], timeout_s=2.0)
    assert left.result() == "w0"
    assert isinstance(sent.exception(), RuntimeError)
    assert isinstance(stayed.exception(), RuntimeError)


def test_a_receiver_that_never_comes_is_not_waited_for_longer_than_said():
    sender = Sender(weights(), receivers=1, host=HOST, timeout_s=0.5)
    with pytest.raises(RuntimeError):
        sender.send()
