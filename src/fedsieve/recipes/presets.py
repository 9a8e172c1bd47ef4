"""The papers' settings for each dataset: model, clients, rounds, learning rate. The method goes in; a Run comes out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeAlias

from fedsieve.engine import Run, Task
from fedsieve.types import Method

Tiers: TypeAlias = tuple[float, ...]
ONE: Tiers = (1.0,)
HELD_OUT = 0.1
"""The share of every client's examples that ZeroFL keeps for validation (A.5); FLASH and SparseFedPP train on all."""


def digits(method: Method[Any], partition: str = "lda:1.0", tiers: Tiers = ONE) -> Run:
    """Return scikit-learn's 8x8 digits on a small network: 20 clients, 5 a round, 2 epochs, half a minute."""
    return Run(method, Task("digits_net", "digits", 20, partition, tiers=tiers), 80, 5, epochs=2, lr=0.4, lr_end=0.02)


def mnist(method: Method[Any], partition: str = "lda:1.0", tiers: Tiers = ONE) -> Run:
    """Return MNIST on MNISTNet, 100 clients, 10 a round (FLASH, Table 1)."""
    task = Task("mnist_net", "mnist", 100, partition, tiers=tiers)
    return Run(method, task, 400, 10, batch=32, lr=0.1, lr_end=0.001, lr_offset=1)


def cifar10(method: Method[Any], partition: str = "lda:1.0") -> Run:
    """Return CIFAR-10 on ResNet-18, 100 clients, 10 a round (ZeroFL, Sec. 4.1, A.5 and A.6)."""
    task = Task("resnet18", "cifar10", 100, partition, validation=HELD_OUT)
    return Run(method, task, 700, 10, lr=0.1, lr_end=0.01, evaluate_every=10)


def femnist(method: Method[Any], clients: int = 300) -> Run:
    """Return FEMNIST by writer on the LEAF CNN, 35 a round (ZeroFL, Sec. 4.1, A.5 and A.6, of 3,597 writers)."""
    task = Task("leaf_cnn", "femnist", clients, "group", validation=HELD_OUT)
    return Run(method, task, 1000, 35, lr=0.004, lr_end=0.001, evaluate_every=10)


def flash_cifar10(method: Method[Any], partition: str = "lda:1.0", tiers: Tiers = ONE) -> Run:
    """Return CIFAR-10 on ResNet-18 with crops and mirror images, 100 clients, 10 a round (FLASH, Table 1)."""
    task = Task("resnet18", "cifar10", 100, partition, tiers=tiers, augment="crop_flip")
    return Run(method, task, 600, 10, lr=0.1, lr_end=0.001, lr_offset=1, evaluate_every=10)


def flash_femnist(method: Method[Any], clients: int = 300, tiers: Tiers = ONE) -> Run:
    """Return FEMNIST by writer on the LEAF CNN, 34 a round (FLASH, Table 1, of 3,400 writers)."""
    task = Task("leaf_cnn", "femnist", clients, "group", tiers=tiers)
    return Run(method, task, 1000, 34, batch=16, lr=0.1, lr_end=0.001, lr_offset=1, evaluate_every=10)


def sparsefedpp_cifar10(method: Method[Any], partition: str = "lda:1.0") -> Run:
    """Return CIFAR-10 on ResNet-18, 100 clients, 10 a round, at SparseFedPP's settings, whatever the method."""
    return _sparsefedpp(method, Task("resnet18", "cifar10", 100, partition, initialisation="truncated_normal"), 700)


def sparsefedpp_speech(method: Method[Any], partition: str = "lda:1.0") -> Run:
    """Return Speech Commands on ResNet-18 at SparseFedPP's settings: CIFAR-10's, but 500 rounds."""
    task = Task("resnet18", "speech_commands", 100, partition, initialisation="truncated_normal")
    return _sparsefedpp(method, task, 500)


def _sparsefedpp(method: Method[Any], task: Task, rounds: int) -> Run:
    run = Run(method, task, rounds, 10, lr=0.5, lr_end=0.01, lr_offset=1, evaluate_every=10)
    return replace(run, weight_decay=1e-3)


def central(run: Run) -> Run:
    """Return the same training in one place: one client that holds everything, a round an epoch."""
    return replace(run, task=replace(run.task, clients=1, partition="iid", tiers=(1.0,)), per_round=1, epochs=1)


def speech(method: Method[Any], partition: str = "lda:1.0", tiers: Tiers = ONE) -> Run:
    """Return Speech Commands, 32x32 MFCC, on ResNet-18, 100 clients, 10 a round (ZeroFL, Sec. 4.1, A.5, A.6)."""
    task = Task("resnet18", "speech_commands", 100, partition, validation=HELD_OUT, tiers=tiers)
    return Run(method, task, 200, 10, lr=0.01, lr_end=0.001, evaluate_every=10)
