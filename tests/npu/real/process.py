"""A process with the real torch_npu and MindSpeed on its path, over the CPU: what they declare, refuse and compute."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

from tests.npu import wrong_callers
from tests.npu.certified import certified
from tests.npu.contract_process import FOREIGN, attributes_of, differing, one_dtype, outcome, quiet
from tests.npu.real import machine
from tests.npu.resumed import trains_on_as_if_it_had_stayed

# Ours, and those that torch_npu or MindSpeed itself is to stop.
EARLY = (
    *("ours after megatron", "ours after vllm", "torch for CUDA", "more processes than devices", "unknown platform"),
    *("no MindSpeed", "unknown MindSpeed"),
)
LATE = (
    *("configured after the groups", "configured anew", "configured back", "repatch with a Namespace"),
    *("batch-invariant attention", "pickled config", "replaced config"),
    "another process gets a result with a gradient",
)
# What the tests call it -> layouts, family and dtype of the certificate's cases.
CERTIFIED = {
    "text": (["single"], "qwen3", "fp32"),
    "bf16": (["single"], "qwen3_moe", "bf16"),
    "vision": (["single"], "qwen3_vl_moe", "fp32"),
    "recomputed": (["single, recompute full"], "qwen3_moe", "fp32"),
    "two ranks": (["DP2, overlap", "PP2", "TP2xEP2"], "qwen3_moe", "fp32"),
    "context parallel": (["CP2"], "qwen3_vl_moe", "fp32"),
    "fused": (["single, fused", "single, recompute full, fused"], "qwen3_moe", "fp32"),
    "fused, bf16": (["single, fused"], "qwen3_moe", "bf16"),
    "fused, two ranks": (["EP2, fused", "TP2xEP2, fused", "CP2, fused"], "qwen3_moe", "fp32"),
}
WITHOUT_TRITON = (["single, fused", "single, recompute full, fused"], "qwen3_moe", "fp32")


def declared() -> dict[str, str]:
    """Operator -> its declaration in torch_npu; those that the fakes have too."""
    from npu_operators import SCHEMAS

    return {name: str(getattr(torch.ops.npu, name).default._schema) for name in SCHEMAS}


def shapes() -> dict[str, list[Any]]:
    """Operator -> its results by torch_npu's Meta kernel and by the fakes: shapes and dtypes."""
    from npu_operators import COMPUTED

    x, labels, sizes = torch.randn(4, 8), torch.tensor([1, 0, 7, 3]), torch.tensor([1, 3])
    routed = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0]], dtype=torch.bool)
    permuted = COMPUTED["npu_moe_token_permute_with_routing_map"](x, routed, probs=x[:, :3], num_out_tokens=8)
    grouped = {"group_list": sizes, "split_item": 2, "group_type": 0, "group_list_type": 1}
    examples: dict[str, tuple[Any, dict[str, Any]]] = {
        "npu_rms_norm": ((x, x[0]), {}),
        "npu_swiglu": ((x,), {}),
        "npu_rotary_mul": ((x[:, None, None],) * 3, {}),
        "npu_grouped_matmul": (([x], [x.T, x.T]), grouped),
        "npu_cross_entropy_loss": ((x, labels), {"reduction": "none"}),
        "npu_moe_token_permute_with_routing_map": ((x, routed), {"probs": x[:, :3], "num_out_tokens": 8}),
        "npu_moe_token_permute_with_routing_map_grad": ((*permuted, routed, 3, 4, False), {}),
        "_npu_moe_token_unpermute_with_routing_map": ((permuted[0], permuted[2], [4, 8]), {}),
        "npu_moe_token_unpermute_with_routing_map_grad": (
            (x, permuted[2], permuted[2], routed, None, None, False, [4, 8]),
            {},
        ),
    }
    return {
        name: [described(getattr(torch.ops.npu, name)(*_on_meta(given), **_on_meta(named))),
               described(COMPUTED[name](*given, **named))]
        for name, (given, named) in examples.items()
    }  # fmt: skip


def _on_meta(tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.to("meta") if torch.is_tensor(leaf) else leaf, tree)


def described(results: Any) -> list[Any]:
    tensors = filter(torch.is_tensor, pytree.tree_leaves(results))
    return [[list(tensor.shape), str(tensor.dtype)] for tensor in tensors]


def reduce_tensor() -> dict[str, Any]:
    """What importing torch_npu put in the place of torch's way of handing tensors to other processes."""
    from torch.multiprocessing import reductions
    from torch_npu.multiprocessing.reductions import rebuild_npu_tensor

    arguments = list(inspect.signature(rebuild_npu_tensor).parameters)
    return {"module": reductions.reduce_tensor.__module__, "arguments": arguments}


def no_value_leaks() -> None:
    """MindSpeed's process-wide values get into a config that leaves fields open, and not into ours."""
    from dapo_mcore.actor.build import transformer_config
    from dapo_mcore.config import Dtype, MegatronConfig
    from tools.certificate.reference import tiny_model

    def both() -> list[Any]:
        ours = transformer_config(tiny_model("qwen3_moe").config, MegatronConfig(), Dtype.fp32)
        return [ours, attributes_of(wrong_callers.open_config)]

    wrong_callers.configure()
    before = both()
    vars(sys.modules["mindspeed.args_utils"].get_full_args()).update(FOREIGN)
    ours, opened = (differing(*pair) for pair in zip(before, both(), strict=True))
    assert ours == [], ours
    assert opened != []


def replaced() -> dict[str, Any]:
    from megatron.core.extensions import transformer_engine as extensions

    from dapo_mcore.platform.mindspeed import REPLACED

    return {"te": extensions.HAVE_TE, "modules": [vars(extensions)[name].__module__ for name in REPLACED]}


def main(answer: Path) -> None:
    kernels = machine.install()
    wrong = {name: outcome(wrong_callers.EARLY[name]) for name in EARLY}
    arguments = list(sys.argv)
    import dapo_mcore.actor  # noqa: F401

    restored = sys.argv == arguments
    wrong |= {name: outcome(wrong_callers.LATE[name]) for name in LATE}
    certificates = {name: certified(*case) for name, case in CERTIFIED.items()}
    sys.modules[machine.SORTING] = None  # type: ignore[assignment]
    certificates["fused, no Triton"] = certified(*WITHOUT_TRITON)
    told = {
        "declared": declared(),
        "shapes": shapes(),
        "reduce_tensor": reduce_tensor(),
        "wrong": wrong,
        "no_value_leaks": outcome(no_value_leaks),
        "one_dtype": outcome(one_dtype),
        "quiet": outcome(quiet),
        "replaced": replaced() | {"arguments_restored": restored},
        "certified": certificates,
        "resumed": trains_on_as_if_it_had_stayed(),
    }
    del kernels
    answer.write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
