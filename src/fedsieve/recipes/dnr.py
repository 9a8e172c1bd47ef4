"""DNR (Kundu et al. 2021) in one place: the centralised curves of FLASH, Fig. 2."""

from __future__ import annotations

from dataclasses import replace

from fedsieve.engine import Run
from fedsieve.methods import DNR
from fedsieve.recipes import presets


def central_digits() -> Run:
    """DNR at density .1 on the digits in one place: one client, a round an epoch."""
    return replace(presets.central(presets.digits(DNR())), lr=0.2)


def central_mnist() -> Run:
    """DNR at density .1 on MNIST in one place: one client, a round an epoch."""
    return replace(presets.central(presets.mnist(DNR())), rounds=40)


def central_cifar10() -> Run:
    """DNR at density .1 on CIFAR-10 in one place (FLASH, Fig. 2): one client, a round an epoch."""
    return replace(presets.central(presets.flash_cifar10(DNR())), rounds=200, batch=128)
