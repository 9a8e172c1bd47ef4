"""The built-in recipes: every method on every dataset, at the settings of the method's paper, and what is beside that.

Rows of the papers' tables differ from a recipe by some settings: see ``fedsieve.recipes.papers``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from fedsieve.engine import Run, Task
from fedsieve.methods import (
    DNR,
    FLASH,
    METHODS,
    NST,
    PDST,
    FedAdam,
    FedAvg,
    HeteroFLASH,
    Private,
    SparseFedPP,
    Swat,
    TopK,
    ZeroFL,
)
from fedsieve.recipes.presets import PRESETS, VALIDATION, central
from fedsieve.types import Method


@dataclass(frozen=True)
class Recipe:
    """A run, and what ``fedsieve list recipes`` says of it."""

    about: str
    run: Run


DATASETS = ("digits", "mnist", "cifar10_iid", "cifar10_niid", "femnist", "speech_iid", "speech_niid")

PRODUCT: dict[str, tuple[str, Method[Any], str]] = {
    "fedavg": ("Dense FedAvg", FedAvg(), ""),
    "fedadam": ("FedAdam", FedAdam(), ""),
    "swat": ("SWAT at 90 %", Swat(sparsity=0.9, policy="zerofl"), ""),
    "zerofl": ("ZeroFL at 90 %, top weights + 10 %", ZeroFL(sparsity=0.9, r_mask=0.1), ""),
    "topk": ("Top-k at 90 %", TopK(sparsity=0.9), ""),
    "sparsefedpp": ("SparseFedPP at 95 %", SparseFedPP(), "sparsefedpp_"),
    "nst": ("NST at density .1", NST(), "flash_"),
    "pdst": ("PDST at density .1", PDST(), "flash_"),
    "flash": ("FLASH at density .1", FLASH(), "flash_"),
    "hetero_flash": ("hetero-FLASH at densities .2, .15, .1", HeteroFLASH(), "flash_"),
}
"""What runs on all datasets: its name for people, the method, and the prefix of the presets that are taken first."""

TIERS = {"hetero_flash": (0.4, 0.3, 0.3)}
"""The device classes' shares of the clients (FLASH, Table 4), where a method serves several."""

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "flash.femnist": {"c_d": 34},
    "hetero_flash.digits": {"c_d": 5},
    "hetero_flash.femnist": {"c_d": 34},
}
"""Fields in which a recipe's method differs from that of the product."""


@cache
def recipes() -> dict[str, Recipe]:
    """Return the built-in recipes by name, ``METHOD.DATASET``, in the order of the methods."""
    known = {f"{method}.{dataset}": _product(method, dataset) for method in PRODUCT for dataset in DATASETS}
    known |= _others()
    return {name: known[name] for method in METHODS for name in known if name.partition(".")[0] == method}


def _product(name: str, dataset: str) -> Recipe:
    about, method, first = PRODUCT[name]
    preset = PRESETS.get(first + dataset) or PRESETS[dataset]
    method = replace(method, **EXCEPTIONS.get(f"{name}.{dataset}", {}))  # type: ignore[type-var]
    return Recipe(f"{about} on {preset.about}", preset.run(method, TIERS.get(name, (1.0,))))


def _others() -> dict[str, Recipe]:
    """Return the recipes of other methods and settings: the papers' comparisons, training in one place, privacy."""
    digits, flash_cifar10, flash_femnist = (PRESETS[n] for n in ("digits", "flash_cifar10_niid", "flash_femnist"))
    sparsefedpp, even = PRESETS["sparsefedpp_cifar10_niid"], PRESETS["sparsefedpp_cifar10_iid"]
    fig_1 = f"{sparsefedpp.about} (its Fig. 1)"
    one_client = Task("resnet18", "cifar10", 1, validation=VALIDATION)
    private = replace(digits.run(FLASH()), task=Task("digits_net", "digits", 100), rounds=40, per_round=50, epochs=5)
    return {
        "fedavg.flash_cifar10": Recipe(
            f"Dense FedAvg on {flash_cifar10.about} (its Table 2)", flash_cifar10.run(FedAvg())
        ),
        "fedavg.flash_femnist": Recipe(f"Dense FedAvg on {flash_femnist.about}", flash_femnist.run(FedAvg())),
        "fedavg.sparsefedpp_cifar10": Recipe(f"Dense FedAvg on {fig_1}", sparsefedpp.run(FedAvg())),
        "flash.sparsefedpp_cifar10": Recipe(f"FLASH at density .1 on {fig_1}", sparsefedpp.run(FLASH())),
        "zerofl.sparsefedpp_cifar10": Recipe(
            f"ZeroFL at 90 %, top weights alone, on {fig_1}", sparsefedpp.run(ZeroFL(sparsity=0.9, r_mask=0))
        ),
        "topk.digits": Recipe(f"Top-k at 90 % on {digits.about}", replace(digits.run(TopK(sparsity=0.9)), lr=0.3)),
        "topk.cifar10_iid": Recipe(f"Top-k at 95 % on {even.about}", even.run(TopK(sparsity=0.95))),
        "topk.cifar10_niid": Recipe(f"Top-k at 95 % on {sparsefedpp.about}", sparsefedpp.run(TopK(sparsity=0.95))),
        "swat.central_digits": Recipe(
            "SWAT at 90 % on the digits in one place: one client, a round an epoch",
            replace(digits.run(Swat(sparsity=0.9)), task=Task("digits_net", "digits", 1), per_round=1),
        ),
        "swat.central_cifar10": Recipe(
            "SWAT at 90 % on CIFAR-10 in one place (ZeroFL, Fig. 1): one client, a round an epoch",
            Run(Swat(sparsity=0.9, period=10), one_client, 150, 1, batch=128, lr=0.1, lr_end=0.001, weight_decay=5e-4),
        ),
        "dnr.central_digits": Recipe(
            "DNR at density .1 on the digits in one place: one client, a round an epoch",
            replace(central(digits.run(DNR())), lr=0.2),
        ),
        "dnr.central_mnist": Recipe(
            "DNR at density .1 on MNIST in one place: one client, a round an epoch",
            replace(central(PRESETS["mnist"].run(DNR())), rounds=40),
        ),
        "dnr.central_cifar10": Recipe(
            "DNR at density .1 on CIFAR-10 in one place (FLASH, Fig. 2): one client, a round an epoch",
            replace(central(flash_cifar10.run(DNR())), rounds=200, batch=128),
        ),
        "private.digits": Recipe(
            "FLASH at density .1 on the handwritten digits, 100 equal clients, 50 a round, noise of one clip of .3",
            replace(
                private,
                method=Private(FLASH(c_d=50), clip=0.3, noise=1.0, cohort=50),
                batch=8,
                lr=0.3,
                lr_end=0.075,
            ),
        ),
    }
