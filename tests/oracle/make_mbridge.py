"""Ask mbridge how it lays Hugging Face weights out for Megatron, and store a digest of each tensor for the unit tests.

Runs where mbridge is installed beside megatron-core and transformers (mbridge_requirements.txt), without a device: only
its mapping is asked, since its models need Transformer Engine.

    python tests/oracle/make_mbridge.py [file]
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from mbridge.core.bridge import _MODEL_REGISTRY
from mbridge.core.parallel_states import ParallelStates
from mbridge_inputs import FAMILIES, SIZES, digest, hf_tensor, megatron_names

FILE = Path(__file__).parents[1] / "data" / "oracle" / "mbridge.json"


def ask(family: str) -> dict[str, str]:
    """Megatron name -> digest of the whole tensor."""
    kind, options = FAMILIES[family]
    config = getattr(transformers, kind)(**{**SIZES, **options})
    bridge = _MODEL_REGISTRY[family](config, dtype=torch.float32, parallel_states=ParallelStates())
    answers = {}
    for name in megatron_names(family):
        tensors = [hf_tensor(family, hf_name) for hf_name in bridge._weight_name_mapping_mcore_to_hf(name)]
        answers[name] = digest(bridge._weight_to_mcore_format(name, tensors))
    return answers


def main(file: Path) -> None:
    answers = {
        "peer": "mbridge",
        "version": version("mbridge"),
        "digests": {family: ask(family) for family in FAMILIES},
    }
    file.write_text(json.dumps(answers, indent=1) + "\n")
    print(f"mbridge {answers['version']}: {file}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FILE)
