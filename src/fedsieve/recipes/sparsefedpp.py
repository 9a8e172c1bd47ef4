"""SparseFedPP (Guastella et al. 2024). Points of Fig. 1 differ in method.sparsity and task.partition."""

from __future__ import annotations

from fedsieve.engine import Run
from fedsieve.methods import SparseFedPP
from fedsieve.recipes import presets


def digits() -> Run:
    """SparseFedPP at 95 % on the handwritten digits, LDA 1.0."""
    return presets.digits(SparseFedPP())


def mnist() -> Run:
    """SparseFedPP at 95 % on MNIST, LDA 1.0."""
    return presets.mnist(SparseFedPP())


def cifar10_iid() -> Run:
    """SparseFedPP at 95 % on CIFAR-10, LDA 1000."""
    return presets.sparsefedpp_cifar10(SparseFedPP(), "lda:1000")


def cifar10_niid() -> Run:
    """SparseFedPP at 95 % on CIFAR-10, LDA 1.0."""
    return presets.sparsefedpp_cifar10(SparseFedPP(), "lda:1.0")


def femnist() -> Run:
    """SparseFedPP at 95 % on 300 writers of FEMNIST; the complete set: -s task.clients=3597."""
    return presets.femnist(SparseFedPP())


def speech_iid() -> Run:
    """SparseFedPP at 95 % on Speech Commands, LDA 1000."""
    return presets.sparsefedpp_speech(SparseFedPP(), "lda:1000")


def speech_niid() -> Run:
    """SparseFedPP at 95 % on Speech Commands, LDA 1.0."""
    return presets.sparsefedpp_speech(SparseFedPP(), "lda:1.0")
