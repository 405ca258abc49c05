from typing import cast

import pytest

from dapo_mcore.desk import Desk, require_space
from dapo_mcore.prompts import PromptSource
from dapo_mcore.reward import Grader
from dapo_mcore.rollout.bank import Bank
from dapo_mcore.train import load_config
from dapo_mcore.types import Prompt


def test_a_disk_without_room_for_a_checkpoint_is_refused_by_option(tmp_path):
    require_space(tmp_path, 1)
    with pytest.raises(ValueError, match=r"trainer\.output_dir=.*1,000,000,000,000 MB.*make room"):
        require_space(tmp_path, 10**18)


def test_the_state_of_another_version_is_refused_with_the_way_out():
    desk = Desk(
        load_config(["experiment=quickstart"]),
        PromptSource([Prompt(0, 0, (1,), "", "a")], seed=0),
        (),
        cast(Grader, None),
        Bank(0),
    )
    state = desk.state()
    desk.load_state(state)
    with pytest.raises(
        ValueError, match=r"state of prompts, this version needs that of prompts, .*resume_mode=disable"
    ):
        desk.load_state({"prompts": state["prompts"]})
