"""Top-k after dense local training: SparseFedPP's baseline, with its settings on CIFAR-10."""

from __future__ import annotations

from dataclasses import replace

from fedsieve.engine import Run
from fedsieve.methods import TopK
from fedsieve.recipes import presets


def digits() -> Run:
    """Top-k at 90 % on the handwritten digits, LDA 1.0."""
    return replace(presets.digits(TopK(sparsity=0.9)), lr=0.3)


def mnist() -> Run:
    """Top-k at 90 % on MNIST, LDA 1.0."""
    return presets.mnist(TopK(sparsity=0.9))


def cifar10_iid() -> Run:
    """Top-k at 95 % on CIFAR-10, LDA 1000 (SparseFedPP)."""
    return presets.sparsefedpp_cifar10(TopK(sparsity=0.95), "lda:1000")


def cifar10_niid() -> Run:
    """Top-k at 95 % on CIFAR-10, LDA 1.0 (SparseFedPP)."""
    return presets.sparsefedpp_cifar10(TopK(sparsity=0.95), "lda:1.0")


def femnist() -> Run:
    """Top-k at 90 % on 300 writers of FEMNIST; the complete set: -s task.clients=3597."""
    return presets.femnist(TopK(sparsity=0.9))


def speech_iid() -> Run:
    """Top-k at 90 % on Speech Commands, LDA 1000."""
    return presets.speech(TopK(sparsity=0.9), "lda:1000")


def speech_niid() -> Run:
    """Top-k at 90 % on Speech Commands, LDA 1.0."""
    return presets.speech(TopK(sparsity=0.9), "lda:1.0")
