from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest

from dapo_mcore.config import RewardConfig
from dapo_mcore.reward import Grader
from dapo_mcore.types import FinishReason, Prompt, Response


def make_item(response: str, answer: str = "42", **metadata) -> tuple[Prompt, Response]:
    prompt = Prompt(uid=0, row=0, token_ids=(1,), text="", answer=answer, metadata=metadata)
    return prompt, Response(token_ids=(1,), logprobs=(0.0,), text=response, finish_reason=FinishReason.STOP, version=0)


@pytest.fixture
def item():
    return make_item


@pytest.fixture(scope="module")
def grader():
    """The grader of given options, which can import hostile_verifiers.py. Equal options share one within a module."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as open_graders:
        patch.syspath_prepend(str(Path(__file__).parent))

        @cache
        def make(verifier: str = "hostile_verifiers:obey", **options) -> Grader:
            return open_graders.enter_context(Grader(RewardConfig(verifier=verifier, **{"timeout_s": 60.0, **options})))

        yield make
