"""Dense federated averaging (McMahan et al. 2017): what every sparse method is compared with."""

from __future__ import annotations

from fedsieve.engine import Run
from fedsieve.methods import FedAvg
from fedsieve.recipes import presets


def digits() -> Run:
    """Dense FedAvg on the handwritten digits, LDA 1.0."""
    return presets.digits(FedAvg())


def mnist() -> Run:
    """Dense FedAvg on MNIST, LDA 1.0."""
    return presets.mnist(FedAvg())


def cifar10_iid() -> Run:
    """Dense FedAvg on CIFAR-10, LDA 1000."""
    return presets.cifar10(FedAvg(), "lda:1000")


def cifar10_niid() -> Run:
    """Dense FedAvg on CIFAR-10, LDA 1.0."""
    return presets.cifar10(FedAvg(), "lda:1.0")


def femnist() -> Run:
    """Dense FedAvg on 300 writers of FEMNIST; the complete set: -s task.clients=3597."""
    return presets.femnist(FedAvg())


def speech_iid() -> Run:
    """Dense FedAvg on Speech Commands, LDA 1000."""
    return presets.speech(FedAvg(), "lda:1000")


def speech_niid() -> Run:
    """Dense FedAvg on Speech Commands, LDA 1.0."""
    return presets.speech(FedAvg(), "lda:1.0")


def flash_cifar10() -> Run:
    """Dense FedAvg on CIFAR-10 at FLASH's settings, LDA 1.0 (its Table 2)."""
    return presets.flash_cifar10(FedAvg())


def flash_femnist() -> Run:
    """Dense FedAvg on 300 writers of FEMNIST at FLASH's settings; the complete set: -s task.clients=3400."""
    return presets.flash_femnist(FedAvg())


def sparsefedpp_cifar10() -> Run:
    """Dense FedAvg on CIFAR-10 at SparseFedPP's settings, LDA 1.0 (its Fig. 1)."""
    return presets.sparsefedpp_cifar10(FedAvg())
