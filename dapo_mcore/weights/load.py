"""Hugging Face files into Megatron model chunks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dapo_mcore.weights.hf_folder import HFFolder, check_folder
from dapo_mcore.weights.homes import Groups, homes

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


@torch.no_grad()
def load_hf(chunks: Sequence[GPTModel], folder: str | Path, hf_config: Any) -> None:
    """Fill every parameter of this rank's model chunks (bare models, not wrapped for data parallelism) from `folder`.

    Reads what this rank needs, converts to the parameters' dtype. An optimizer that exists already keeps its own copy:
    call its `reload_model_params()` afterwards. Raises ValueError when the folder does not hold exactly the tensors of
    its config, or when the chunks do not have exactly the parameters of the family.
    """
    source = HFFolder(folder)
    check_folder(source, hf_config)
    groups = Groups.current()
    for home in homes(chunks, hf_config, groups):
        parameter, cutting = home.parameter, groups.cutting(home.parameter)
        first_expert = groups.expert.rank() * len(home.shards) if parameter.experts else 0
        for local, shard in enumerate(home.shards):
            full = source.mcore_tensor(parameter, first_expert + local)
            shard.copy_(parameter.layout.cut(full, cutting.rank(), cutting.size()))
