"""What each module of torch.nn multiplies, dense and at a density: PyTorch's counter, and arithmetic by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fedsieve.client.cost import Cost
from fedsieve.client.operations import plain_operations
from fedsieve.sparse.effective import swat_where_possible_
from fedsieve.sparse.policy import select_weights
from weighted_modules import MODULES, Make, dataset

EXAMPLES = 6
ATTENTION = 3 * 2 * 6 * 8  # forward and both gradients, of scores and of values, of width 6, for 8 queries
WITHOUT_WEIGHTS = {
    "MultiheadAttention": ATTENTION * 9,  # keys, one of them a bias
    "MultiheadAttention, other keys": ATTENTION * 8,
    "TransformerEncoderLayer": ATTENTION * 8,
    "TransformerDecoderLayer": 2 * ATTENTION * 8,
}
"""Multiply-adds of an example's training step that no weight takes part in."""
NOT_BY_PYTORCH = {
    "Bilinear": 2 * 8 * 4 * (6 * 6 + 6),
    "Conv1d, depthwise": 4 * 3 * 16 * (1 - 8),
}
"""Those that PyTorch's counter leaves out: Bilinear's forward and weight gradient, at 8 positions. And too many of a
weight gradient of 4 positions and 3 taps: for 16 channels out it counts all 8 in, where each has one."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def step(model: nn.Module) -> None:
    x, y = dataset().train.batch(slice(0, EXAMPLES))
    loss = F.cross_entropy(model.train()(x), y)
    torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)


def cost_of(model: nn.Module) -> Cost:
    return Cost(model, examples=dataset().train.batch(slice(0, 4)))


@pytest.mark.parametrize("name", MODULES)
def test_dense_it_is_what_pytorchs_counter_says_and_half_the_weights_multiply_half(name: str) -> None:
    model = Make(name)()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), plain_operations():
        step(model)
    dense = counter.get_total_flops() / 2 + EXAMPLES * NOT_BY_PYTORCH.get(name, 0)
    cost = cost_of(model)
    assert cost.other_ops.unknown == ()
    step(model)
    assert (cost.products.real, cost.products.dense) == (dense, dense)

    cost.restart()
    for weight in select_weights("all", model):
        declared: Any = model.get_parameter(weight)
        declared.densities = (0.5, 0.5, 0.5)
    step(model)
    rest = EXAMPLES * WITHOUT_WEIGHTS.get(name, 0)
    assert (cost.products.real, cost.products.dense) == (rest + (dense - rest) / 2, dense)


def test_each_weight_counts_at_its_own_density() -> None:
    model = Make("LSTM, projected")()
    cost = cost_of(model)
    declared: Any = model.get_parameter("inner.weight_hh_l1")
    declared.densities = (0.25, 0.5, 1.0)
    step(model)
    state = EXAMPLES * 3 * 4 * 5  # the state of 3 numbers, to 4 gates of 5; the first one, zeros, needs no gradient
    assert cost.products.dense - cost.products.real == 8 * state * 0.75 + 7 * state * 0.5


def test_weights_computed_for_a_pass_count_at_the_share_of_their_non_zeros() -> None:
    model = Make("MultiheadAttention, other keys")()
    swat_where_possible_(model, {"inner.q_proj_weight": 0.25}, 1)
    cost = cost_of(model)
    step(model)
    query = EXAMPLES * 8 * 6 * 6  # the input needs no gradient, and the weight's is dense
    assert cost.products.dense - cost.products.real == query * 0.75
