"""FLASH (Babakniya et al. 2022). Rows of Table 2 differ in method.density and task.partition."""

from __future__ import annotations

from fedsieve.engine import Run
from fedsieve.methods import FLASH
from fedsieve.recipes import presets


def digits() -> Run:
    """FLASH at density .1 on the handwritten digits, LDA 1.0."""
    return presets.digits(FLASH())


def mnist() -> Run:
    """FLASH at density .1 on MNIST, LDA 1.0."""
    return presets.mnist(FLASH())


def cifar10_iid() -> Run:
    """FLASH at density .1 on CIFAR-10, LDA 1000."""
    return presets.flash_cifar10(FLASH(), "lda:1000")


def cifar10_niid() -> Run:
    """FLASH at density .1 on CIFAR-10, LDA 1.0."""
    return presets.flash_cifar10(FLASH(), "lda:1.0")


def femnist() -> Run:
    """FLASH at density .1 on 300 writers of FEMNIST; the complete set: -s task.clients=3400."""
    return presets.flash_femnist(FLASH(c_d=34))


def speech_iid() -> Run:
    """FLASH at density .1 on Speech Commands, LDA 1000."""
    return presets.speech(FLASH(), "lda:1000")


def speech_niid() -> Run:
    """FLASH at density .1 on Speech Commands, LDA 1.0."""
    return presets.speech(FLASH(), "lda:1.0")


def sparsefedpp_cifar10() -> Run:
    """FLASH at density .1 on CIFAR-10 at SparseFedPP's settings, LDA 1.0 (its Fig. 1)."""
    return presets.sparsefedpp_cifar10(FLASH())
