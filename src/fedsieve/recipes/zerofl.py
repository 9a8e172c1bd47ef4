"""ZeroFL (Qiu et al. 2022). Rows of Tables 1 to 3 differ in method.sparsity, method.r_mask and method.upload."""

from __future__ import annotations

from fedsieve.engine import Run
from fedsieve.methods import ZeroFL
from fedsieve.recipes import presets


def digits() -> Run:
    """ZeroFL at 90 %, top weights + 10 % on the handwritten digits, LDA 1.0."""
    return presets.digits(ZeroFL(sparsity=0.9, r_mask=0.1))


def mnist() -> Run:
    """ZeroFL at 90 %, top weights + 10 % on MNIST, LDA 1.0."""
    return presets.mnist(ZeroFL(sparsity=0.9, r_mask=0.1))


def cifar10_iid() -> Run:
    """ZeroFL at 90 %, top weights + 10 % on CIFAR-10, LDA 1000."""
    return presets.cifar10(ZeroFL(sparsity=0.9, r_mask=0.1), "lda:1000")


def cifar10_niid() -> Run:
    """ZeroFL at 90 %, top weights + 10 % on CIFAR-10, LDA 1.0."""
    return presets.cifar10(ZeroFL(sparsity=0.9, r_mask=0.1), "lda:1.0")


def femnist() -> Run:
    """ZeroFL at 90 %, top weights + 10 % on 300 writers of FEMNIST; the complete set: -s task.clients=3597."""
    return presets.femnist(ZeroFL(sparsity=0.9, r_mask=0.1))


def speech_iid() -> Run:
    """ZeroFL at 90 %, top weights + 10 % on Speech Commands, LDA 1000."""
    return presets.speech(ZeroFL(sparsity=0.9, r_mask=0.1), "lda:1000")


def speech_niid() -> Run:
    """ZeroFL at 90 %, top weights + 10 % on Speech Commands, LDA 1.0."""
    return presets.speech(ZeroFL(sparsity=0.9, r_mask=0.1), "lda:1.0")


def sparsefedpp_cifar10() -> Run:
    """ZeroFL at 90 %, top weights alone, on CIFAR-10 at SparseFedPP's settings, LDA 1.0 (its Fig. 1)."""
    return presets.sparsefedpp_cifar10(ZeroFL(sparsity=0.9, r_mask=0))
