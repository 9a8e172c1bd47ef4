"""Exact top-k by what is near the last threshold: whatever that was, what is kept is what a sort keeps."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from awkward import randn
from fedsieve.kernels import Trainer
from fedsieve.kernels.abi import PruneOp, SelectionArgs, address
from fedsieve.kernels.functional import SingleOp
from fedsieve.kernels.products import SwatProduct
from fedsieve.sparse.layers import swat_
from fedsieve.sparse.selection import support
from stepping import batches

pytestmark = pytest.mark.usefixtures("native")
NUMBERS = {
    "normal": lambda: randn(19, 5, 7, 6),
    "after a ReLU": lambda: randn(19, 5, 7, 6).relu(),
    "few values": lambda: randn(19, 5, 7, 6).mul(2).round(),
    "all the same": lambda: torch.full((3, 2, 5, 5), -0.5),
    "zeros": lambda: torch.zeros(3, 2, 5, 5),
    "far apart": lambda: randn(19, 5, 7, 6).mul(20).exp(),
    "subnormal": lambda: randn(19, 5, 7, 6) * 1e-41,
    "not finite": lambda: randn(19, 5, 7, 6).where(randn(19, 5, 7, 6, seed=1) < 1, torch.tensor(math.inf)),
}


def pruned(x: Tensor, count: int, last: float, threads: int) -> tuple[Tensor, float]:
    """Return x with its largest ``count`` alone, and their threshold; ``last`` was that of a step before."""
    threshold, selected = torch.tensor([last]), torch.zeros(1, dtype=torch.int64)
    room = torch.empty(threads * 4 * 2048, dtype=torch.int32)
    work = SingleOp(len(x), "fp32")
    out = work.map(*x.shape[1:])
    op = PruneOp(
        SelectionArgs(count, 1, address(threshold), address(selected), address(room)), work.pack(x), out, len(x)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        work.run(op)
    finally:
        torch.set_num_threads(before)
    assert int(selected) == min(count, int(x.count_nonzero()))
    return work.unpack(out), float(threshold)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("name", NUMBERS)
def test_the_last_threshold_changes_nothing(name: str, share: float) -> None:
    x = NUMBERS[name]()
    count = max(1, int(share * x.numel()))
    want = x.where(support(x, count), torch.zeros(()))
    _, own = pruned(x, count, 0.0, 1)
    lasts = [
        0.0,
        own,
        0.999 * own,
        1.001 * own,
        0.86 * own,
        1.17 * own,
        0.5 * own,
        2 * own,
        math.inf,
        math.nan,
        1e-45,
        -1.0,
    ]
    for threads in (1, 2, 3):
        for last in lasts:
            got, threshold = pruned(x, count, last, threads)
            assert torch.equal(got, want), (threads, last)
            assert threshold == own


@pytest.mark.parametrize("lr", [1e-4, 0.05, 3.0])
@pytest.mark.parametrize("threads", [1, 2])
def test_weights_are_selected_exactly_at_every_step(lr: float, threads: int) -> None:
    """Their thresholds move little, some, and far: from notes made while they were written, or from all of them."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 40, 3, padding=1), nn.ReLU(), nn.Conv2d(40, 70, 3, 1, 1), nn.ReLU(), nn.Conv2d(70, 9, 3, 2)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(81, 4))
    with torch.no_grad():  # many ties
        model[2].weight.copy_(model[2].weight.mul(200).round() / 200)
    swat_(model, {f"{i}.weight": d for i, d in ((0, 0.2), (2, 0.05), (4, 0.1), (7, 0.05))}, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        trainer = Trainer(copy.deepcopy(model), {}, 17, lr=lr, momentum=0.5)
        data = batches((3, 8, 8), (17,) * 6)
        trainer.step(*data[0])
        products = [product for product in trainer.lowered.products.values() if isinstance(product, SwatProduct)]
        for x, y in data[1:]:
            trainer.write_()
            wanted = [product.layer.module.weight.clone() for product in products]
            trainer.step(x, y)
            for product, weight in zip(products, wanted, strict=True):
                mask = support(weight, product.own.k)  # rows in order, and entries in rows
                assert torch.equal(product.own.values[: product.own.k], weight[mask])
                assert int(product.index.row[-1]) == product.own.k
    finally:
        torch.set_num_threads(before)
