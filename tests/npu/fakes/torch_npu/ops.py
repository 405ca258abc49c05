"""Operators in torch.ops.npu, with the declarations of torch_npu."""

from __future__ import annotations

from npu_operators import COMPUTED, SCHEMAS
from torch import library

LIBRARY = library.Library("npu", "DEF")
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema)
    LIBRARY.impl(_name, COMPUTED[_name], "CompositeImplicitAutograd")
