"""The ranks share out the files of a checkpoint, and know alike whether it can be used."""

from __future__ import annotations

from tests.distributed.checkpoint_ranks import found_after_damage
from tools.certificate.spawn import spawn


def test_damage_of_any_file_is_known_to_every_rank(tmp_path):
    first, second = spawn(found_after_damage, 2, tmp_path / "checkpoints")
    for rank in (first, second):
        assert (rank["step"], rank["state"]) == (7, {"after": 7})
        assert rank["newest"] == tmp_path / "checkpoints" / "step_000007"
    assert first["said"].keys() == second["said"].keys()
    assert len(first["said"]) >= 3  # more files than ranks
    for name, (newest, reports, error) in first["said"].items():
        assert newest is None
        assert len(reports) == 1
        assert name in reports[0]
        assert error.startswith("CorruptCheckpoint")
        assert name in error
        newest, reports, error = second["said"][name]
        assert (newest, reports) == (None, ())
        assert error.startswith("LeaderError")
