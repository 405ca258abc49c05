"""Policy loss of large vocabularies: fused with the output layer, chunked over tokens, split over ranks."""

from dapo_kernels.api import (
    TokenLogprobs,
    fused_linear_policy_loss,
    fused_policy_loss_from_logits,
    linear_logprobs,
)
from dapo_kernels.call import PolicyLoss
from dapo_kernels.spec import KLEstimator, PolicyLossSpec, Surrogate

__all__ = [
    "KLEstimator",
    "PolicyLoss",
    "PolicyLossSpec",
    "Surrogate",
    "TokenLogprobs",
    "fused_linear_policy_loss",
    "fused_policy_loss_from_logits",
    "linear_logprobs",
]
