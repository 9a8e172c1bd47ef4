"""Runs with chance in the data and in the model, for engines that must draw it alike."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fedsieve import Method, Run
from fedsieve.methods import SparseFedPP, Swat, ZeroFL
from tiny import TinyNet, tiny_run

MOMENTUM: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.01, "norm_weight_decay": False, "epochs": 2}
BY_TURNS = {
    "swat by turns": Swat(0.7, period=3),
    "zerofl by turns": ZeroFL(0.7, period=2),
    "sparsefedpp cached": SparseFedPP(0.7, activations="cached"),
}
SEVERAL = ["fedavg", "nst", "flash", "swat by turns"]


class DropNet(TinyNet):
    """Chance inside the model."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.3, self.training))


def cropped(method: Method[Any], **changes: Any) -> Run:
    """Return a run whose clients' batches are cropped."""
    one = tiny_run(method, **{"rounds": 2, **changes})
    return replace(one, task=replace(one.task, augment="crop_flip"))
