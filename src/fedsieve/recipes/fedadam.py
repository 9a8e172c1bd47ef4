"""Dense local training with an adaptive server (Reddi et al. 2021)."""

from __future__ import annotations

from fedsieve.engine import Run
from fedsieve.methods import FedAdam
from fedsieve.recipes import presets


def digits() -> Run:
    """FedAdam on the handwritten digits, LDA 1.0."""
    return presets.digits(FedAdam())


def mnist() -> Run:
    """FedAdam on MNIST, LDA 1.0."""
    return presets.mnist(FedAdam())


def cifar10_iid() -> Run:
    """FedAdam on CIFAR-10, LDA 1000."""
    return presets.cifar10(FedAdam(), "lda:1000")


def cifar10_niid() -> Run:
    """FedAdam on CIFAR-10, LDA 1.0."""
    return presets.cifar10(FedAdam(), "lda:1.0")


def femnist() -> Run:
    """FedAdam on 300 writers of FEMNIST; the complete set: -s task.clients=3597."""
    return presets.femnist(FedAdam())


def speech_iid() -> Run:
    """FedAdam on Speech Commands, LDA 1000."""
    return presets.speech(FedAdam(), "lda:1000")


def speech_niid() -> Run:
    """FedAdam on Speech Commands, LDA 1.0."""
    return presets.speech(FedAdam(), "lda:1.0")
