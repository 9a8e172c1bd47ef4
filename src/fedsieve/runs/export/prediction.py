"""``fedsieve predict``: the classes that a model finds most likely, as a table or as JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import typer
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from fedsieve.kernels import Predictor, loaded_isa
from fedsieve.runs.export.examples import ExampleSource
from fedsieve.runs.export.model import TrainedModel
from fedsieve.types import InputError

WIDE = 10_000
"""Columns of an output that is not a terminal: nothing is cut or folded."""
KERNELS = ("auto", "sparse", "dense")


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one example, the likeliest first, with their probabilities."""

    name: str
    top: tuple[tuple[str, float], ...]
    truth: str | None = None

    @property
    def right(self) -> bool:
        """Whether the likeliest class is the true one."""
        return self.top[0][0] == self.truth

    def json(self) -> str:
        """Return it as a line."""
        line = {"input": self.name, "label": self.top[0][0], "probability": self.top[0][1], "top": self.top}
        return json.dumps(line if self.truth is None else line | {"truth": self.truth}, ensure_ascii=False)


def choose_forward(model: TrainedModel, batch: int, kernels: str = "auto") -> tuple[Callable[[Tensor], Tensor], str]:
    """Return what computes the logits of up to ``batch`` examples, and in words which way that is.

    ``kernels``: ``sparse`` skips the zeros and raises InputError where that cannot be; ``dense`` is the plain model;
    ``auto`` is sparse where it can be.
    """
    if kernels not in KERNELS:
        raise InputError(f"--kernels must be one of {', '.join(KERNELS)}, got {kernels!r}")
    if kernels == "dense":
        return model.network, "dense"
    predictor = Predictor(model.network, batch)
    predictor(torch.zeros(1, *model.metadata.shape))  # which makes its plan, or finds out why it cannot
    if predictor.reason is None:
        return predictor, f"sparse ({loaded_isa()})"
    if kernels == "sparse":
        raise InputError(f"there are no sparse kernels for this model, because {predictor.reason}: use --kernels dense")
    return model.network, f"dense, because {predictor.reason}"


@torch.inference_mode()
def predict(
    model: TrainedModel, inputs: ExampleSource, logits_of: Callable[[Tensor], Tensor], batch: int, top: int = 1
) -> Iterator[Prediction]:
    """Yield the ``top`` likeliest classes of every example, ``batch`` examples at once. Raises InputError."""
    classes = model.metadata.classes
    for i in range(0, len(inputs.names), batch):
        names = inputs.names[i : i + batch]
        x = model.normalize(inputs.read(i, i + len(names)))
        logits = logits_of(x)
        for what, numbers in (("the input holds", x), ("the model answers", logits)):
            finite = numbers.isfinite().flatten(1).all(1).tolist()
            if not all(finite):
                raise InputError(f"{names[finite.index(False)]}: {what} a number that is not finite: leave it out")
        share, index = logits.softmax(1).topk(min(top, len(classes)))
        for j, name in enumerate(names):
            best = zip(index[j].tolist(), share[j].tolist(), strict=True)
            truth = None if inputs.truth is None else classes[int(inputs.truth[i + j])]
            yield Prediction(name, tuple((classes[k], p) for k, p in best), truth)


def print_predictions(predictions: Iterable[Prediction], as_json: bool = False, console: Console | None = None) -> None:
    """Print predictions as a table, or as lines of JSON, each when it is there; and the accuracy, where it is known.

    With JSON, the accuracy goes to stderr.
    """
    console = console or Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDE)
    table, right = Table("input", "label", Column("probability", justify="right"), "", box=None, pad_edge=False), []
    for one in predictions:
        if one.truth is not None:
            right.append(one.right)
        if as_json:
            typer.echo(one.json())
        else:
            (label, share), *rest = one.top
            wrong = f"{label} (is {one.truth})" if one.truth is not None and not one.right else label
            table.add_row(one.name, wrong, f"{share:.1%}", "  ".join(f"{name} {p:.1%}" for name, p in rest))
    if not as_json:
        console.print(table)
    if right:
        typer.echo(f"accuracy {sum(right) / len(right):.2%} of {len(right)} examples", err=as_json)
