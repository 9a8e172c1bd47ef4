"""PDST, one frozen random mask: the baseline of FLASH (Babakniya et al. 2022), at its settings."""

from __future__ import annotations

from fedsieve.engine import Run
from fedsieve.methods import PDST
from fedsieve.recipes import presets


def digits() -> Run:
    """PDST at density .1 on the handwritten digits, LDA 1.0."""
    return presets.digits(PDST())


def mnist() -> Run:
    """PDST at density .1 on MNIST, LDA 1.0."""
    return presets.mnist(PDST())


def cifar10_iid() -> Run:
    """PDST at density .1 on CIFAR-10, LDA 1000."""
    return presets.flash_cifar10(PDST(), "lda:1000")


def cifar10_niid() -> Run:
    """PDST at density .1 on CIFAR-10, LDA 1.0."""
    return presets.flash_cifar10(PDST(), "lda:1.0")


def femnist() -> Run:
    """PDST at density .1 on 300 writers of FEMNIST; the complete set: -s task.clients=3400."""
    return presets.flash_femnist(PDST())


def speech_iid() -> Run:
    """PDST at density .1 on Speech Commands, LDA 1000."""
    return presets.speech(PDST(), "lda:1000")


def speech_niid() -> Run:
    """PDST at density .1 on Speech Commands, LDA 1.0."""
    return presets.speech(PDST(), "lda:1.0")
