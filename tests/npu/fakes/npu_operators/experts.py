"""Tokens brought to their experts and back, as CANN defines it where every token has equally many experts."""

from __future__ import annotations

import torch
from npu_contract import require
from torch import Tensor


def npu_moe_token_permute_with_routing_map(
    tokens: Tensor,
    routing_map: Tensor,
    *,
    probs: Tensor | None = None,
    num_out_tokens: int | None = None,
    drop_and_pad: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Rows expert after expert, their probabilities, and in which row each token's first, second, ... copy is."""
    require(not drop_and_pad, "no token is dropped")
    chosen = routing_map.sum(1)
    require(bool((chosen == chosen[0]).all()), "every token has equally many experts: rows are found by division")
    require(num_out_tokens == int(chosen.sum()), "all copies of all tokens come out")
    require(probs is None or probs.dtype is tokens.dtype, "tokens and probabilities are of one dtype")
    owners = routing_map.T.nonzero()[:, 1]
    rows = owners.argsort(stable=True).int()
    return tokens[owners], None if probs is None else probs.T[routing_map.T], rows


def npu_moe_token_permute_with_routing_map_grad(
    permuted_token_out_grad: Tensor,
    probs_grad: Tensor | None,
    sorted_indices: Tensor,
    routing_map: Tensor,
    experts_num: int,
    tokens_num: int,
    drop_and_pad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Of tokens and of probabilities [tokens, experts]."""
    tokens = _summed(permuted_token_out_grad, sorted_indices, tokens_num)
    if probs_grad is None:
        return tokens, None
    require(probs_grad.dtype is permuted_token_out_grad.dtype, "both gradients are of one dtype")
    of_experts = probs_grad.new_zeros(experts_num, tokens_num).masked_scatter(routing_map.T, probs_grad)
    return tokens, of_experts.T.contiguous()


def _npu_moe_token_unpermute_with_routing_map(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    restore_shape: list[int],
    *,
    probs: Tensor | None = None,
    routing_map: Tensor | None = None,
    drop_and_pad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Sums of each token's copies; the other results are of use to padded experts alone, and hold no index here."""
    require(not drop_and_pad and probs is None, "no token is dropped, and experts have weighted their own results")
    nowhere = torch.full_like(sorted_indices, -1)
    return _summed(permuted_tokens, sorted_indices, restore_shape[0]), nowhere, nowhere.clone(), None


def npu_moe_token_unpermute_with_routing_map_grad(
    unpermuted_tokens_grad: Tensor,
    out_index: Tensor,
    permuted_token_id: Tensor,
    routing_map: Tensor | None,
    permuted_tokens: Tensor | None,
    probs: Tensor | None,
    drop_and_pad: bool,
    restore_shape: list[int],
) -> tuple[Tensor, Tensor | None]:
    """Of each copy its token's."""
    require(bool((out_index >= 0).all()), "gradients go where the tokens came from")
    copies = unpermuted_tokens_grad.repeat_interleave(len(out_index) // restore_shape[0], 0)
    return torch.empty_like(copies).index_copy(0, out_index.long(), copies), None


def _summed(rows: Tensor, places: Tensor, tokens: int) -> Tensor:
    return rows[places].unflatten(0, (tokens, -1)).sum(1)
