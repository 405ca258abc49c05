"""What ranks find imported; nothing of it starts a thread or reads an option that a test changes."""

from dapo_mcore.rollout.vllm_env import prepare_environment

prepare_environment()

import vllm.model_executor.models.qwen3_moe  # noqa: E402
import vllm.v1.engine.llm_engine  # noqa: E402, F401

import dapo_mcore.actor.actor  # noqa: E402
import dapo_mcore.rollout.vllm_worker  # noqa: E402, F401
