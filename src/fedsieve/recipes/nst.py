"""NST, a mask for every client: the baseline of FLASH (Babakniya et al. 2022), at its settings."""

from __future__ import annotations

from fedsieve.engine import Run
from fedsieve.methods import NST
from fedsieve.recipes import presets


def digits() -> Run:
    """NST at density .1 on the handwritten digits, LDA 1.0."""
    return presets.digits(NST())


def mnist() -> Run:
    """NST at density .1 on MNIST, LDA 1.0."""
    return presets.mnist(NST())


def cifar10_iid() -> Run:
    """NST at density .1 on CIFAR-10, LDA 1000."""
    return presets.flash_cifar10(NST(), "lda:1000")


def cifar10_niid() -> Run:
    """NST at density .1 on CIFAR-10, LDA 1.0."""
    return presets.flash_cifar10(NST(), "lda:1.0")


def femnist() -> Run:
    """NST at density .1 on 300 writers of FEMNIST; the complete set: -s task.clients=3400."""
    return presets.flash_femnist(NST())


def speech_iid() -> Run:
    """NST at density .1 on Speech Commands, LDA 1000."""
    return presets.speech(NST(), "lda:1000")


def speech_niid() -> Run:
    """NST at density .1 on Speech Commands, LDA 1.0."""
    return presets.speech(NST(), "lda:1.0")
