"""PDST with a softmax before the loss, which has its own: what FLASH's public code does on MNIST.

    fedsieve run reproductions/flash/doubled.py:pdst

The row of the paper is flash_table2/20: density .05, LDA 0.1. Everything but the network is that row's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedsieve import Run
from fedsieve.client.models import MNISTNet
from fedsieve.recipes import apply_settings, load_recipe


class Doubled(MNISTNet):
    """MNISTNet whose outputs are probabilities, though the loss expects logits."""

    def forward(self, x: Tensor) -> Tensor:
        """[n, 1, 28, 28] -> [n, 10], rows that add up to 1."""
        return torch.softmax(super().forward(x), 1)


def net() -> Doubled:
    """Return the network for MNIST."""
    return Doubled(1, 10)


def pdst() -> Run:
    """PDST at density .05 on MNIST, LDA 0.1, with a softmax too many."""
    run = apply_settings(
        load_recipe("pdst.mnist"), ["method.density=0.05", "task.partition=lda:0.1", "evaluate_every=10"]
    )
    return replace(run, task=replace(run.task, model=net))
