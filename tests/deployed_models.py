"""TrainedModel models that tell inputs apart, and the commands that use them."""

import sys
from typing import Any

import pytest
import torch

from fedsieve.client.models import MODELS
from fedsieve.runs.model import ModelMetadata, TrainedModel


def make(
    model: str = "digits_net", shape: tuple[int, ...] = (1, 8, 8), dataset: str = "digits", **metadata: Any
) -> TrainedModel:
    """Return an untrained model whose outputs tell inputs apart, with a sparse first layer."""
    torch.manual_seed(0)
    net = MODELS[model](shape[0], 10).eval()
    for weight in (w for w in net.parameters() if w.dim() > 1):
        weight.data[torch.rand(weight.shape) < 0.8] = 0.0
    told = {"task": {"model": model, "dataset": dataset}}
    plain = {"recipe": "a.b", "version": "1", "classes": tuple("0123456789"), "mean": (0.0,), "std": (1.0,)}
    return TrainedModel(net.requires_grad_(False), ModelMetadata(run=told, shape=shape, **plain | metadata))


def command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Return the exit code, stdout and stderr of a command line."""
    from fedsieve.cli import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fedsieve", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
    return (int(stop.value.code or 0), *capsys.readouterr())
