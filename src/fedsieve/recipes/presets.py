"""The papers' settings for each dataset: everything of a run but its method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedsieve.engine import Run, Task
from fedsieve.types import Method


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
WRITERS = "300 writers of FEMNIST{}; the complete set: -s task.clients={}"

PRESETS: dict[str, Preset] = {
    # scikit-learn's 8x8 digits on a small network: half a minute
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
