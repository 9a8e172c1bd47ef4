"""Every method, in the variants that differ in kind: the list behind all tests of methods. A new method is one line."""

from collections.abc import Iterable
from typing import Any

import pytest

from fedsieve import methods
from fedsieve.server.aggregate import Adam
from fedsieve.types import Method

METHODS: dict[str, Method[Any]] = {
    "fedavg": methods.FedAvg(),
    "fedadam": methods.FedAdam(eta=0.02),
    "fedprox": methods.FedProx(mu=0.1),
    "scaffold": methods.SCAFFOLD(),
    "scaffold, as Flower": methods.SCAFFOLD(start="model", weighting="samples"),
    "swat": methods.Swat(sparsity=0.7),
    "swat, erk, period": methods.Swat(sparsity=0.7, budget="erk", period=3),
    "zerofl full": methods.ZeroFL(0.7, 0.0, "full"),
    "zerofl top_weights": methods.ZeroFL(0.7, 0.2, "top_weights"),
    "zerofl diff_of_top": methods.ZeroFL(0.7, 0.2, "diff_of_top"),
    "zerofl top_diff": methods.ZeroFL(0.7, 0.2, "top_diff"),
    "zerofl top_diff, adam": methods.ZeroFL(0.7, 0.2, "top_diff", server=Adam(eta=0.02)),
    "topk": methods.TopK(sparsity=0.6),
    "topk, pruned": methods.TopK(sparsity=0.6, deployment="pruned"),
    "sparsefedpp": methods.SparseFedPP(sparsity=0.6),
    "sparsefedpp, a = 1, pruned": methods.SparseFedPP(sparsity=0.6, a=1.0, activations="all", deployment="pruned"),
    "sparsefedpp, cached": methods.SparseFedPP(sparsity=0.6, activations="cached"),
    "dnr": methods.DNR(density=0.5),
    "nst": methods.NST(density=0.5),
    "nst, sum, pruned, equal": methods.NST(density=0.5, share="sum", deployment="pruned", weighting="equal"),
    "pdst": methods.PDST(density=0.5),
    "pdst, adam, equal": methods.PDST(density=0.5, server=Adam(eta=0.02), weighting="equal"),
    "flash": methods.FLASH(density=0.5, c_d=3, E_d=3),
    "flash, sum, clip, adam": methods.FLASH(0.5, c_d=2, E_d=2, share="sum", excess="clip", server=Adam(eta=0.02)),
    "hetero_flash": methods.HeteroFLASH(densities=(0.6, 0.4, 0.3), c_d=2, E_d=2),
    "hetero_flash, anew": methods.HeteroFLASH(
        (0.6, 0.4, 0.3), c_d=2, E_d=2, excess="clip", draw="bernoulli", subset="magnitude"
    ),
    "nst, units": methods.NST(density=0.5, unit=4),
    "hetero_flash, units": methods.HeteroFLASH((0.6, 0.4, 0.3), c_d=2, E_d=2, subset="magnitude", unit=4),
    "feddst": methods.FedDST(density=0.5, interval=2, end=1.0),
    "feddst, as the authors": methods.FedDST(
        0.5, of="all", interval=1, end=1.0, adjust_epoch=1, first_mask="random", growth="all", squared=True
    ),
    "private": methods.Private(methods.PDST(density=0.5), noise=1e-3, cohort=2),
    "private, flash": methods.Private(methods.FLASH(density=0.5, c_d=3, E_d=3), noise=1e-3, cohort=2),
}

KINDS = ("fedavg", "scaffold", "zerofl top_diff", "topk", "nst", "flash", "hetero_flash", "private")
"""Methods that differ in what travels: whole tensors, these with control variates, positions of a client's choice
(differences, or weights), those of masks that clients train, one mask after a warm-up, masks by device class, noisy
values."""


def kinds_first(names: Iterable[str]) -> list[Any]:
    """Return the names as parameters of a test: those that are no kind of their own run with the system tests alone."""
    return [name if name in KINDS else pytest.param(name, marks=pytest.mark.system) for name in names]
