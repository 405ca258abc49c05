"""The process environment that vLLM reads when it is imported and while it starts."""

from __future__ import annotations

import logging
import os

from dapo_mcore.platform import platform

FIXED = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process: weights are handed over as tensors
}
DEFAULTS = {
    "HF_HUB_OFFLINE": "1",  # models are folders; nothing is looked up on the network
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several engines share the cores of a host, one per rank
}


def prepare_environment() -> None:
    """Set what an in-process engine needs, before the first `import vllm`.

    What the user exported stays, except for what this package's engine and the platform's cannot do without. vLLM
    changes the process it lives in. `undisturbed_rng` undoes what it does to the random number generators; the rest
    stays, on a CPU: `torch.set_num_threads` and `torch.accelerator.synchronize` do nothing from the first engine on,
    and memory is allocated on the NUMA node of the first allowed core. Set threads before the first engine is built:
    the shared-memory collectives of a tensor-parallel engine are laid out for the number they find. Where no
    torch.distributed world exists, vLLM creates one of a single rank.

    Raises:
        ValueError: the platform's engines cannot live in this environment.
    """
    traits = platform().engines
    traits.refuse_environment()
    os.environ.update(FIXED | dict(traits.environment))
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # it warns before it has read the level
