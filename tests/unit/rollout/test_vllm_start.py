"""What vLLM is started with; vLLM itself is not."""

import pytest

from dapo_mcore.config import RolloutConfig
from dapo_mcore.rollout.vllm_start import tokens_per_step

LONGEST = 32_768


@pytest.mark.parametrize(
    ("asked", "reads_chunks", "given"),
    [(8_192, True, 8_192), (65_536, True, 65_536), (8_192, False, LONGEST), (65_536, False, 65_536)],
)
def test_an_engine_reads_as_many_tokens_at_a_time_as_asked_where_prompts_may_be_cut(asked, reads_chunks, given):
    assert tokens_per_step(RolloutConfig(max_num_batched_tokens=asked), LONGEST, reads_chunks) == given
