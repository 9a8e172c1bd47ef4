"""hetero-FLASH (Babakniya et al. 2022): 40, 30 and 30 % of the clients hold densities .2, .15 and .1 (Table 4)."""

from __future__ import annotations

from fedsieve.engine import Run
from fedsieve.methods import HeteroFLASH
from fedsieve.recipes import presets

TIERS = (0.4, 0.3, 0.3)


def digits() -> Run:
    """hetero-FLASH at densities .2, .15, .1 on the handwritten digits, LDA 1.0."""
    return presets.digits(HeteroFLASH(c_d=5), tiers=TIERS)


def mnist() -> Run:
    """hetero-FLASH at densities .2, .15, .1 on MNIST, LDA 1.0."""
    return presets.mnist(HeteroFLASH(), tiers=TIERS)


def cifar10_iid() -> Run:
    """hetero-FLASH at densities .2, .15, .1 on CIFAR-10, LDA 1000."""
    return presets.flash_cifar10(HeteroFLASH(), "lda:1000", tiers=TIERS)


def cifar10_niid() -> Run:
    """hetero-FLASH at densities .2, .15, .1 on CIFAR-10, LDA 1.0."""
    return presets.flash_cifar10(HeteroFLASH(), "lda:1.0", tiers=TIERS)


def femnist() -> Run:
    """hetero-FLASH at densities .2, .15, .1 on 300 writers of FEMNIST; the complete set: -s task.clients=3400."""
    return presets.flash_femnist(HeteroFLASH(c_d=34), tiers=TIERS)


def speech_iid() -> Run:
    """hetero-FLASH at densities .2, .15, .1 on Speech Commands, LDA 1000."""
    return presets.speech(HeteroFLASH(), "lda:1000", tiers=TIERS)


def speech_niid() -> Run:
    """hetero-FLASH at densities .2, .15, .1 on Speech Commands, LDA 1.0."""
    return presets.speech(HeteroFLASH(), "lda:1.0", tiers=TIERS)
