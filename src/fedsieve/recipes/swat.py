"""SWAT (Raihan & Aamodt 2020), central and in federated learning, where it is ZeroFL's `full` upload."""

from __future__ import annotations

from dataclasses import replace

from fedsieve.engine import Run, Task
from fedsieve.methods import Swat
from fedsieve.recipes import presets


def digits() -> Run:
    """SWAT at 90 % on the handwritten digits, LDA 1.0."""
    return presets.digits(Swat(sparsity=0.9, policy="zerofl"))


def mnist() -> Run:
    """SWAT at 90 % on MNIST, LDA 1.0."""
    return presets.mnist(Swat(sparsity=0.9, policy="zerofl"))


def cifar10_iid() -> Run:
    """SWAT at 90 % on CIFAR-10, LDA 1000."""
    return presets.cifar10(Swat(sparsity=0.9, policy="zerofl"), "lda:1000")


def cifar10_niid() -> Run:
    """SWAT at 90 % on CIFAR-10, LDA 1.0."""
    return presets.cifar10(Swat(sparsity=0.9, policy="zerofl"), "lda:1.0")


def femnist() -> Run:
    """SWAT at 90 % on 300 writers of FEMNIST; the complete set: -s task.clients=3597."""
    return presets.femnist(Swat(sparsity=0.9, policy="zerofl"))


def speech_iid() -> Run:
    """SWAT at 90 % on Speech Commands, LDA 1000."""
    return presets.speech(Swat(sparsity=0.9, policy="zerofl"), "lda:1000")


def speech_niid() -> Run:
    """SWAT at 90 % on Speech Commands, LDA 1.0."""
    return presets.speech(Swat(sparsity=0.9, policy="zerofl"), "lda:1.0")


def central_digits() -> Run:
    """SWAT at 90 % on the digits in one place: one client, a round an epoch."""
    return replace(presets.digits(Swat(sparsity=0.9), "iid"), task=Task("digits_net", "digits", 1), per_round=1)


def central_cifar10() -> Run:
    """SWAT at 90 % on CIFAR-10 in one place (ZeroFL, Fig. 1): one client, a round an epoch."""
    task = Task("resnet18", "cifar10", 1, validation=presets.HELD_OUT)
    return Run(Swat(sparsity=0.9, period=10), task, 150, 1, batch=128, lr=0.1, lr_end=0.001, weight_decay=5e-4)
