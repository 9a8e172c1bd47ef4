"""The built-in recipes: every method on every dataset, at the settings of the method's paper, and what is beside that.

``PRESETS`` are the papers' settings for each dataset: everything of a run but its method. Rows of the papers' tables
differ from a recipe by some settings: see ``fedsieve.recipes.papers``. What is no paper's (the digits', the GPT's, the
regression's) is judged on validation by ``benchmarks/settings.py``; its table stands in docs/benchmarks/accuracy.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from fedsieve import methods
from fedsieve.client.lora import LoRA
from fedsieve.client.losses import CrossEntropy, NextToken, Regression
from fedsieve.engine import Run, Task
from fedsieve.types import AdamW, Method


@dataclass(frozen=True)
class Preset:
    """A dataset with its model, clients, rounds and learning rate, whatever the method."""

    about: str
    """What ``fedsieve list`` says of it, after "on"."""
    task: Task
    settings: Mapping[str, Any]
    """The fields of ``Run`` that are not the default."""

    def run(self, method: Method[Any], tiers: tuple[float, ...] = (1.0,)) -> Run:
        """Return the run of a method; ``tiers`` are the device classes' shares of the clients."""
        return Run(method, replace(self.task, tiers=tiers), **self.settings)


def central(run: Run) -> Run:
    """Return the same training in one place: one client that holds everything, a round an epoch."""
    return replace(run, task=replace(run.task, clients=1, partition="iid", tiers=(1.0,)), per_round=1, epochs=1)


def _iid_and_not(name: str, about: str, task: Task, settings: Mapping[str, Any]) -> dict[str, Preset]:
    """Return a dataset's two presets, of an even partition (LDA 1000) and of an uneven one (LDA 1.0)."""
    return {
        f"{name}_{split}": Preset(about.format(f"LDA {alpha}"), replace(task, partition=f"lda:{alpha}"), settings)
        for split, alpha in (("iid", "1000"), ("niid", "1.0"))
    }


VALIDATION = 0.1
"""The share of every client's examples that ZeroFL keeps for validation (A.5); FLASH and SparseFedPP train on all."""
FLASH_LR = {"lr": 0.1, "lr_end": 0.001, "lr_offset": 1}
SPARSEFEDPP = {"per_round": 10, "lr": 0.5, "lr_end": 0.01, "lr_offset": 1, "weight_decay": 1e-3, "evaluate_every": 10}
ADAMW = {"optimizer": AdamW(), "lr_schedule": "cosine", "weight_decay": 0.01, "clip_norm": 1.0}
VIT = {**ADAMW, "weight_decay": 0.05, "lr": 1e-3, "lr_end": 1e-5}
ATTENTION = LoRA(modules="*.qkv")
CONSTANT = {"lr": 0.01, "lr_end": 0.01, "momentum": 0.9}
WRITERS = "300 writers of FEMNIST{}; the complete set: -s task.clients={}"

PRESETS: dict[str, Preset] = {
    # scikit-learn's 8x8 digits on a small network: half a minute; settings of our own, judged on validation
    "digits": Preset(
        "the handwritten digits, LDA 1.0",
        Task("digits_net", "digits", 20, "lda:1.0"),
        {"rounds": 80, "per_round": 5, "epochs": 2, "lr": 0.4, "lr_end": 0.02},
    ),
    # FLASH, Table 1
    "mnist": Preset(
        "MNIST, LDA 1.0",
        Task("mnist_net", "mnist", 100, "lda:1.0"),
        {"rounds": 400, "per_round": 10, "batch": 32, **FLASH_LR},
    ),
    # ZeroFL, Sec. 4.1, A.5 and A.6; of FEMNIST it has 3,597 writers, of speech commands 32x32 MFCC
    **_iid_and_not(
        "cifar10",
        "CIFAR-10, {}",
        Task("resnet18", "cifar10", 100, validation=VALIDATION),
        {"rounds": 700, "per_round": 10, "lr": 0.1, "lr_end": 0.01, "evaluate_every": 10},
    ),
    "femnist": Preset(
        WRITERS.format("", 3597),
        Task("leaf_cnn", "femnist", 300, "group", validation=VALIDATION),
        {"rounds": 1000, "per_round": 35, "lr": 0.004, "lr_end": 0.001, "evaluate_every": 10},
    ),
    **_iid_and_not(
        "speech",
        "Speech Commands, {}",
        Task("resnet18", "speech_commands", 100, validation=VALIDATION),
        {"rounds": 200, "per_round": 10, "lr": 0.01, "lr_end": 0.001, "evaluate_every": 10},
    ),
    # LEAF's Shakespeare (Caldas et al. 2018), of char-rnn's roles: lr and batch are LEAF's; the GPT's settings our own
    "shakespeare": Preset(
        "Shakespeare's roles, by LEAF's LSTM",
        Task("char_lstm", "shakespeare", 227, "group", loss=NextToken()),
        {"rounds": 100, "per_round": 10, "batch": 10, "lr": 0.8, "lr_end": 0.8, "evaluate_every": 10},
    ),
    "gpt": Preset(
        "Shakespeare's roles, by a small GPT",
        Task("char_gpt", "shakespeare", 227, "group", loss=NextToken()),
        {"rounds": 100, "per_round": 10, "batch": 8, **ADAMW, "lr": 3e-3, "lr_end": 3e-4, "evaluate_every": 10},
    ),
    # scikit-learn's diabetes: a regression of one number, on ten hospitals; settings of our own, judged on validation
    "diabetes": Preset(
        "a regression of diabetes' progress",
        Task("mlp", "diabetes", 10, loss=Regression()),
        {"rounds": 60, "per_round": 5, "epochs": 2, "batch": 8, **ADAMW, "lr": 1e-2, "lr_end": 1e-3},
    ),
    # FLASH, Table 1: CIFAR-10 with crops and mirror images, FEMNIST of 3,400 writers
    **_iid_and_not(
        "flash_cifar10",
        "CIFAR-10 at FLASH's settings, {}",
        Task("resnet18", "cifar10", 100, augment="crop_flip"),
        {"rounds": 600, "per_round": 10, **FLASH_LR, "evaluate_every": 10},
    ),
    "flash_femnist": Preset(
        WRITERS.format(" at FLASH's settings", 3400),
        Task("leaf_cnn", "femnist", 300, "group"),
        {"rounds": 1000, "per_round": 34, "batch": 16, **FLASH_LR, "evaluate_every": 10},
    ),
    # NIID-Bench (Li et al. 2022) by Flower's baseline, and FedDST by the authors' code
    "niidbench_cifar10": Preset(
        "CIFAR-10 at NIID-Bench's settings, Dirichlet .5",
        Task("lenet5", "cifar10", 10, "dirichlet:0.5"),
        {"rounds": 50, "per_round": 10, "epochs": 10, "batch": 64, **CONSTANT, "weight_decay": 1e-5},
    ),
    "feddst_cifar10": Preset(
        "CIFAR-10 at FedDST's settings, Dirichlet .1",
        Task("feddst_net", "cifar10", 400, "dirichlet:0.1:1"),
        {
            "rounds": 400,
            "per_round": 20,
            "epochs": 10,
            "batch": 32,
            **CONSTANT,
            "weight_decay": 1e-3,
            "evaluate_every": 10,
        },
    ),
    # models of images beside the papers'; settings of our own
    **{
        name: Preset(
            f"CIFAR-10 by {about}, LDA 1000",
            Task(model, "cifar10", 100, "lda:1000", augment="crop_flip"),
            {"rounds": 100, "per_round": 10, "batch": 32, "evaluate_every": 10, **settings},
        )
        for name, model, about, settings in (
            ("vit", "vit_tiny", "ViT-tiny", VIT),
            ("resnet50", "resnet50", "ResNet-50", {}),
            ("mobilenet", "mobilenet_v2", "MobileNetV2", {}),
            ("groupnorm", "resnet18_groupnorm", "ResNet-18 with GroupNorm", {}),
        )
    },
    "vit_start": Preset(
        "half of CIFAR-10 by ViT-tiny: a start for fine-tuning",
        Task("vit_tiny", "cifar10", 1, part="1/2", augment="crop_flip"),
        {"rounds": 50, "per_round": 1, "batch": 128, "evaluate_every": 10, **VIT},
    ),
    "lora_vit": Preset(
        "LoRA adapters of ViT-tiny, the other half of CIFAR-10, Dirichlet .5; --init RUN of fedavg.vit_start",
        Task("vit_tiny", "cifar10", 50, "dirichlet:0.5", part="2/2", adapters=ATTENTION, augment="crop_flip"),
        {"rounds": 50, "per_round": 10, "batch": 32, "evaluate_every": 10, **VIT},
    ),
    "gpt_start": Preset(
        "half of Shakespeare's roles by a small GPT: a start for fine-tuning",
        Task("char_gpt", "shakespeare", 114, "group", loss=NextToken(), part="1/2"),
        {"rounds": 100, "per_round": 10, "batch": 8, **ADAMW, "lr": 1.5e-3, "lr_end": 1.5e-4, "evaluate_every": 10},
    ),
    "lora_gpt": Preset(
        "LoRA adapters of a small GPT, the other half of Shakespeare's roles; --init RUN of fedavg.gpt_start",
        Task("char_gpt", "shakespeare", 113, "group", loss=NextToken(), part="2/2", adapters=LoRA()),
        {"rounds": 50, "per_round": 10, "batch": 8, **ADAMW, "lr": 3e-3, "lr_end": 3e-4, "evaluate_every": 10},
    ),
    # SparseFedPP: the same for both, but 700 rounds and 500
    **_iid_and_not(
        "sparsefedpp_cifar10",
        "CIFAR-10 at SparseFedPP's settings, {}",
        Task("resnet18", "cifar10", 100, initialisation="truncated_normal"),
        {"rounds": 700, **SPARSEFEDPP},
    ),
    **_iid_and_not(
        "sparsefedpp_speech",
        "Speech Commands at SparseFedPP's settings, {}",
        Task("resnet18", "speech_commands", 100, initialisation="truncated_normal"),
        {"rounds": 500, **SPARSEFEDPP},
    ),
}


@dataclass(frozen=True)
class Recipe:
    """A run, and what ``fedsieve list recipes`` says of it."""

    about: str
    run: Run


DATASETS = ("digits", "mnist", "cifar10_iid", "cifar10_niid", "femnist", "speech_iid", "speech_niid")

PRODUCT: dict[str, tuple[str, Method[Any], str]] = {
    "fedavg": ("Dense FedAvg", methods.FedAvg(), ""),
    "fedadam": ("FedAdam", methods.FedAdam(), ""),
    "fedprox": ("FedProx, mu .01,", methods.FedProx(), ""),
    "scaffold": ("SCAFFOLD", methods.SCAFFOLD(), ""),
    "swat": ("SWAT at 90 %", methods.Swat(sparsity=0.9, policy="zerofl"), ""),
    "zerofl": ("ZeroFL at 90 %, top weights + 10 %", methods.ZeroFL(sparsity=0.9, r_mask=0.1), ""),
    "topk": ("Top-k at 90 %", methods.TopK(sparsity=0.9), ""),
    "sparsefedpp": ("SparseFedPP at 95 %", methods.SparseFedPP(), "sparsefedpp_"),
    "nst": ("NST at density .1", methods.NST(), "flash_"),
    "pdst": ("PDST at density .1", methods.PDST(), "flash_"),
    "flash": ("FLASH at density .1", methods.FLASH(), "flash_"),
    "hetero_flash": ("hetero-FLASH at densities .2, .15, .1", methods.HeteroFLASH(), "flash_"),
    "feddst": ("FedDST at density .2", methods.FedDST(), ""),
}
"""What runs on all datasets: its name for people, the method, and the prefix of the presets that are taken first."""

ANIMALS = CrossEntropy(weight=(1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0))
"""Class weights of CIFAR-10: birds, cats, deer, dogs, frogs and horses against vehicles."""

TIERS = {"hetero_flash": (0.4, 0.3, 0.3), "hetlora": (0.4, 0.3, 0.3)}
"""The device classes' shares of the clients (FLASH, Table 4), where a method serves several."""

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "flash.femnist": {"c_d": 34},
    "hetero_flash.digits": {"c_d": 5},
    "hetero_flash.femnist": {"c_d": 34},
}
"""Fields in which a recipe's method differs from that of the product."""


@cache
def recipes() -> dict[str, Recipe]:
    """Return the built-in recipes by name, in the order of the methods: ``METHOD.DATASET``, or ``lora.DATASET``."""
    known = {f"{method}.{dataset}": _product(method, dataset) for method in PRODUCT for dataset in DATASETS} | _others()
    first = (*methods.METHODS, "lora")
    return {name: known[name] for method in first for name in known if name.partition(".")[0] == method}


def _product(name: str, dataset: str) -> Recipe:
    about, method, first = PRODUCT[name]
    preset = PRESETS.get(first + dataset) or PRESETS[dataset]
    method = replace(method, **EXCEPTIONS.get(f"{name}.{dataset}", {}))  # type: ignore[type-var]
    return Recipe(f"{about} on {preset.about}", preset.run(method, TIERS.get(name, (1.0,))))


def _others() -> dict[str, Recipe]:
    """Return the recipes of other methods and settings: the papers' comparisons, training in one place, privacy."""
    digits, flash_cifar10, flash_femnist = (PRESETS[n] for n in ("digits", "flash_cifar10_niid", "flash_femnist"))
    sparsefedpp, even = PRESETS["sparsefedpp_cifar10_niid"], PRESETS["sparsefedpp_cifar10_iid"]
    niidbench, feddst = PRESETS["niidbench_cifar10"], PRESETS["feddst_cifar10"]
    fig_1 = f"{sparsefedpp.about} (its Fig. 1)"
    dense, swat, topk, dnr = methods.FedAvg(), methods.Swat(sparsity=0.9), methods.TopK(sparsity=0.95), methods.DNR()
    several = methods.TopK(sparsity=0.8, policy="all")
    private = methods.Private(methods.FLASH(c_d=50), clip=0.3, noise=1.0, cohort=50)
    others = {
        "fedavg.flash_cifar10": (f"Dense FedAvg on {flash_cifar10.about} (its Table 2)", flash_cifar10.run(dense)),
        "fedavg.flash_femnist": (f"Dense FedAvg on {flash_femnist.about}", flash_femnist.run(dense)),
        "fedavg.sparsefedpp_cifar10": (f"Dense FedAvg on {fig_1}", sparsefedpp.run(dense)),
        "flash.sparsefedpp_cifar10": (f"FLASH at density .1 on {fig_1}", sparsefedpp.run(methods.FLASH())),
        "zerofl.sparsefedpp_cifar10": (
            f"ZeroFL at 90 %, top weights alone, on {fig_1}",
            sparsefedpp.run(methods.ZeroFL(sparsity=0.9, r_mask=0)),
        ),
        **{
            f"{method}.niidbench_cifar10": (f"{about} on {niidbench.about}", niidbench.run(own))
            for method, about, own in (
                ("fedavg", "Dense FedAvg", dense),
                ("fedprox", "FedProx, mu .01,", methods.FedProx()),
                ("scaffold", "SCAFFOLD", methods.SCAFFOLD(weighting="samples")),
            )
        },
        "fedavg.feddst_cifar10": (f"Dense FedAvg on {feddst.about}", feddst.run(dense)),
        "feddst.feddst_cifar10": (
            f"FedDST at density .2 on {feddst.about}",
            feddst.run(methods.FedDST(alpha=0.01, interval=15)),
        ),
        "scaffold.digits": (f"SCAFFOLD on {digits.about}", replace(digits.run(methods.SCAFFOLD()), lr=0.2)),
        "topk.digits": (
            f"Top-k at 90 % on {digits.about}",
            replace(digits.run(methods.TopK(sparsity=0.9)), lr=0.3),
        ),
        **{
            f"{method}.{data}": (f"{about} on {PRESETS[data].about}", PRESETS[data].run(own))
            for data in ("shakespeare", "gpt", "diabetes", "vit_start", "gpt_start")
            for method, about, own in (("fedavg", "Dense FedAvg", dense), ("topk", "Top-k at 80 %", several))
            if method == "fedavg" or not data.endswith("_start")
        },
        **{
            f"flash.{data}": (f"FLASH at density .2 on {PRESETS[data].about}", PRESETS[data].run(methods.FLASH(0.2)))
            for data in ("shakespeare", "gpt")
        },
        "zerofl.gpt": (f"{PRODUCT['zerofl'][0]} on {PRESETS['gpt'].about}", PRESETS["gpt"].run(PRODUCT["zerofl"][1])),
        **{
            f"{method}.{data}": (f"{about} on {PRESETS[data].about}", PRESETS[data].run(own))
            for data in ("vit", "resnet50", "mobilenet", "groupnorm")
            for method, (about, own, _) in PRODUCT.items()
            if method in ("fedavg", "zerofl", "topk", "flash")
        },
        **{
            f"{method}.{data}": (f"{about} on {PRESETS[data].about}", PRESETS[data].run(own, TIERS.get(method, (1.0,))))
            for data in ("lora_vit", "lora_gpt")
            for method, about, own in (
                ("topk", "Top-k of the update at 80 %", replace(several, of="update")),
                ("flash", "FLASH at density .2", methods.FLASH(0.2)),
                ("hetlora", "HetLoRA at ranks 8, 4, 2", methods.HetLoRA()),
            )
        },
        **{
            f"lora.{data}": (f"FedAvg on {PRESETS[f'lora_{data}'].about}", PRESETS[f"lora_{data}"].run(dense))
            for data in ("vit", "gpt")
        },
        "flash.weighted_cifar10": (
            f"FLASH at density .1 on {flash_cifar10.about}, animals counting twice",
            replace(weighted := flash_cifar10.run(methods.FLASH()), task=replace(weighted.task, loss=ANIMALS)),
        ),
        "topk.cifar10_iid": (f"Top-k at 95 % on {even.about}", even.run(topk)),
        "topk.cifar10_niid": (f"Top-k at 95 % on {sparsefedpp.about}", sparsefedpp.run(topk)),
        "swat.central_digits": (
            "SWAT at 90 % on the digits in one place: one client, a round an epoch",
            replace(digits.run(swat), task=Task("digits_net", "digits", 1), per_round=1),
        ),
        "swat.central_cifar10": (
            "SWAT at 90 % on CIFAR-10 in one place (ZeroFL, Fig. 1): one client, a round an epoch",
            Run(
                replace(swat, period=10),
                Task("resnet18", "cifar10", 1, validation=VALIDATION),
                rounds=150,
                per_round=1,
                batch=128,
                lr_end=0.001,
                weight_decay=5e-4,
            ),
        ),
        "dnr.central_digits": (
            "DNR at density .1 on the digits in one place: one client, a round an epoch",
            replace(central(digits.run(dnr)), lr=0.2),
        ),
        "dnr.central_mnist": (
            "DNR at density .1 on MNIST in one place: one client, a round an epoch",
            replace(central(PRESETS["mnist"].run(dnr)), rounds=40),
        ),
        "dnr.central_cifar10": (
            "DNR at density .1 on CIFAR-10 in one place (FLASH, Fig. 2): one client, a round an epoch",
            replace(central(flash_cifar10.run(dnr)), rounds=200, batch=128),
        ),
        "private.digits": (
            "FLASH at density .1 on the handwritten digits, 100 equal clients, 50 a round, noise of one clip of .3",
            Run(private, Task("digits_net", "digits", 100), 40, 50, epochs=5, batch=8, lr=0.3, lr_end=0.075),
        ),
    }
    return {name: Recipe(about, run) for name, (about, run) in others.items()}
