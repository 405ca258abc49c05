import pytest

from dapo_mcore.desk import require_space


def test_a_disk_without_room_for_a_checkpoint_is_refused_by_option(tmp_path):
    require_space(tmp_path, 1)
    with pytest.raises(ValueError, match=r"trainer\.output_dir=.*1,000,000,000,000 MB.*make room"):
        require_space(tmp_path, 10**18)
