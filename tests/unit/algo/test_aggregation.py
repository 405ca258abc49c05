from functools import partial

import pytest
import torch

from dapo_mcore.algo import aggregation
from dapo_mcore.types import TrainBatch

# responses of 3, 1 and 4 tokens; trained: 2, none, 4
LENGTHS = torch.tensor([3, 1, 4])
MASK = torch.tensor([True, False, True, False, True, True, True, True])
LOSSES = torch.tensor([1.0, 100.0, 3.0, 100.0, 2.0, 2.0, 2.0, 6.0])
BATCH = TrainBatch(torch.zeros(8, dtype=torch.int64), 0 * LENGTHS, LENGTHS, MASK, torch.zeros(8), torch.zeros(8))
AGGREGATIONS = {
    "token-mean": (aggregation.token_mean, (4 + 12) / 6),
    "seq-mean-token-sum": (aggregation.seq_mean_token_sum, (4 + 12) / 2),
    "seq-mean-token-mean": (aggregation.seq_mean_token_mean, (2 + 3) / 2),
    "token-sum-norm": (partial(aggregation.token_sum_norm, scale_factor=10), (0.4 + 1.2) / 2),
}


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_responses_without_a_trained_token_count_nowhere(name):
    aggregate, expected = AGGREGATIONS[name]
    weights, denominator = aggregate(BATCH)
    assert weights.dtype == torch.float32
    assert ((weights * LOSSES)[MASK].sum() / denominator).item() == pytest.approx(expected)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_the_order_of_the_responses_does_not_matter(name):
    aggregate, expected = AGGREGATIONS[name]
    order = [2, 0, 1]
    weights, denominator = aggregate(BATCH.select(order))
    losses = torch.cat([LOSSES.split(LENGTHS.tolist())[i] for i in order])
    assert ((weights * losses)[BATCH.select(order).loss_mask].sum() / denominator).item() == pytest.approx(expected)
