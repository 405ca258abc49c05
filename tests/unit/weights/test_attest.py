"""The checksum against the sum written out with Python's integers, and the tally of a push in one process."""

from __future__ import annotations

import pytest
import torch

from dapo_mcore.weights.attest import Attestation, checksum

DTYPES = [torch.bfloat16, torch.float32, torch.float64]


def matrix(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)).to(dtype)


def written_out(tensor: torch.Tensor) -> int:
    """The definition, word by word, as an unsigned number."""
    total = 0
    for number, row in enumerate(tensor):
        raw = bytes(row.contiguous().view(torch.uint8).tolist())
        width = 8 if len(raw) % 8 == 0 else tensor.dtype.itemsize
        words = [raw[at : at + width] for at in range(0, len(raw), width)]
        total += (2 * number + 1) * sum(int.from_bytes(word, "little", signed=True) for word in words)
    return total % 2**64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 8), (1, 4), (6, 3), (7, 1)])
def test_a_checksum_is_the_weighted_sum_of_words_modulo_2_to_the_64(shape, dtype):
    tensor = matrix(shape[0], shape[1], dtype)
    assert int(checksum(tensor)) % 2**64 == written_out(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_does_not_depend_on_where_a_rectangle_lies(dtype):
    table = matrix(12, 32, dtype)
    for column in range(5):  # most of these are not aligned to words
        part = table[2:9, column : column + 16]
        assert int(checksum(part)) == int(checksum(part.clone()))


def test_every_changed_byte_and_every_exchange_of_rows_changes_it():
    tensor = matrix(4, 8, torch.bfloat16)
    right = int(checksum(tensor))
    octets = tensor.view(torch.uint8)
    for place in range(octets.numel()):
        for change in (1, 0x80, 0xFF):
            octets.view(-1)[place] ^= change
            assert int(checksum(tensor)) != right
            octets.view(-1)[place] ^= change
    assert int(checksum(tensor)) == right
    assert int(checksum(tensor[[1, 0, 2, 3]])) != right


def test_a_tally_names_what_changed_on_the_way_and_what_never_came():
    pieces = [matrix(4, 8, torch.float32), matrix(3, 5, torch.bfloat16), matrix(2, 2, torch.float32)]
    tally = Attestation(torch.tensor([32, 15, 4]))
    tally.sent(enumerate(pieces))
    arrived = pieces[0].clone()
    arrived[3, 7] += 1
    tally.received([(0, arrived), (2, pieces[2].clone())])
    changed, absent = tally.faults()
    assert (changed.index, changed.received, changed.checksums[0]) == (0, 32, int(checksum(pieces[0])))
    assert (absent.index, absent.received, absent.checksums[1]) == (1, 0, 0)


def test_what_nobody_sent_and_nobody_received_is_a_fault_and_what_arrived_is_none():
    piece = torch.zeros(4, 8)  # its checksum is that of nothing
    tally = Attestation(torch.tensor([32, 32]))
    tally.sent([(0, piece)])
    tally.received([(0, piece)])
    assert [fault.index for fault in tally.faults()] == [1]


def test_of_one_rectangle_sent_to_several_ranks_the_one_that_changed_is_named():
    piece, changed = matrix(4, 8, torch.bfloat16), matrix(4, 8, torch.bfloat16)
    changed[2, 3] += 1
    tally = Attestation(torch.tensor([32, 32, 32]))
    tally.sent((index, piece) for index in range(3))
    tally.received([(0, piece.clone()), (1, changed), (2, piece.clone())])
    assert [fault.index for fault in tally.faults()] == [1]
