"""TransformerConfig as MindSpeed leaves it: switches fill open fields, and it can be neither pickled nor replaced."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from npu_contract import require

SWITCHES: dict[str, Any] = {"attention_mask_type": "causal", "sparse_mode": 0}  # defaults of its command line
MADE: list[int] = []  # one entry per TransformerConfig


def merge_switches() -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    build, fields = TransformerConfig.__init__, {field.name for field in dataclasses.fields(TransformerConfig)}

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        caller = sys._getframe(1).f_globals["__name__"]
        require(caller != "dataclasses", "dataclasses.replace does not work on a TransformerConfig of MindSpeed's")
        given = {name: value for name, value in SWITCHES.items() if name in fields} | kwargs
        fused = given.pop("apply_rope_fusion", False)  # Megatron would ask for Transformer Engine's
        build(self, *args, **given)
        self.apply_rope_fusion = fused
        for name in SWITCHES.keys() - fields:
            setattr(self, name, SWITCHES[name])
        MADE.append(id(self))

    def refuse(self: Any, protocol: Any) -> Any:
        require(False, "a TransformerConfig of MindSpeed's is of a class made at run time: it cannot be pickled")

    def copied(self: Any, memo: Any = None) -> Any:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    TransformerConfig.__init__ = __init__
    TransformerConfig.__reduce_ex__ = refuse
    TransformerConfig.__copy__ = TransformerConfig.__deepcopy__ = copied
