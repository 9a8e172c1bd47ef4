"""The protocol of a published row: what its run does, term by term, which terms the paper prints, and what it reads.

``protocols.toml`` beside this file says what a run does not; every other term is written from the run itself.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from fedsieve.data import SOURCES
from fedsieve.engine import Run
from fedsieve.methods import HeteroFLASH
from fedsieve.server.aggregate import Adam, Average

MODELS_IN_WORDS = {
    "resnet18": "ResNet-18, its first convolution 3x3 of stride 1, no max-pool",
    "leaf_cnn": "LEAF's CNN: 5x5 convolutions of 32 and 64, linear layers of 2,048 and 62",
    "mnist_net": "MNISTNet: 5x5 convolutions of 10 and 20, linear layers of 50 and 10",
}


@dataclass(frozen=True)
class Reading:
    """Which of a run's accuracies a row prints: that of the last round, of round ``round``, or the best of all."""

    kind: Literal["last", "at", "best"] = "last"
    round: int = 0
    data: Literal["test", "validation"] = "test"

    @property
    def column(self) -> str:
        """Where a row of ``rounds.jsonl`` holds it."""
        return "accuracy" if self.data == "test" else "accuracy_validation"

    @property
    def short(self) -> str:
        """What is to be said beside a number; nothing of the test in the last round."""
        when = {"last": "", "at": f"at round {self.round}", "best": "best"}[self.kind]
        return " ".join(filter(None, [when, "" if self.data == "test" else self.data]))

    def evaluate_every(self, rounds: int) -> int:
        """Return how seldom a run of so many rounds may be tested."""
        return {"last": rounds, "at": self.round, "best": 1}[self.kind]

    def __str__(self) -> str:
        when = {"last": "in the last round", "at": f"in round {self.round}", "best": "the highest of all rounds"}
        return f"{self.data} accuracy, {when[self.kind]}"


@dataclass(frozen=True)
class Statement:
    """What a paper says of a table's runs on a dataset; counts are the least and the largest number that is meant."""

    data: str
    version: str = ""
    """Of several published versions of the dataset, as ``data.dataset.Dataset`` names them."""
    train: tuple[int, int] | None = None
    test: tuple[int, int] | None = None
    seeds: int = 1
    not_printed: frozenset[str] = frozenset()
    remarks: dict[str, str] = field(default_factory=dict)


@cache
def statement(table: str, dataset: str) -> Statement:
    """Return what ``protocols.toml`` says of a dataset in a table: the paper's, and what the table says besides."""
    own = tomllib.loads((Path(__file__).parent / "protocols.toml").read_text())
    paper = table.partition("_")[0]
    parts: list[dict[str, Any]] = [own.get(paper, {}), own.get(paper, {}).get(dataset, {})]
    parts += [own.get(table, {}), own.get(table, {}).get(dataset, {})]
    last: dict[str, Any] = {name: value for part in parts for name, value in part.items()}
    counts = {name: (last[name][0], last[name][-1]) for name in ("train", "test") if name in last}
    silent = frozenset(term for part in parts for term in part.get("not_printed", ()))
    remarks = {term: text for part in parts for term, text in part.get("remarks", {}).items()}
    version = last.get("version", "")
    return Statement(last["data"], version, **counts, seeds=last["seeds"], not_printed=silent, remarks=remarks)


def protocol_terms(run: Run, reading: Reading, says: Statement) -> dict[str, str]:
    """Return every term of a row's protocol as a text, "not printed" where the paper is silent, and what was chosen."""
    values = {"data": says.data, **_terms(run), "reading": str(reading), "seeds": str(says.seeds)}
    return {term: _text(term, value, says) for term, value in values.items()}


def _text(term: str, value: str, says: Statement) -> str:
    remark = says.remarks.get(term)
    return f"{'not printed: ' * (term in says.not_printed)}{value}{f' ({remark})' if remark else ''}"


def _terms(run: Run) -> dict[str, str]:
    task = run.task
    return {
        "hold_out": f"{task.validation:.0%} of every client's training examples" if task.validation else "nothing",
        "partition": _partition(str(task.partition)),
        "clients": _clients(run),
        "model": MODELS_IN_WORDS[str(task.model)],
        "initialisation": {"model": "the layers' own"}.get(task.initialisation, "a truncated normal"),
        "normalisation": _normalisation(str(task.dataset)),
        "augmentation": {"none": "none"}.get(task.augment, "random crops and mirror images"),
        "optimiser": "SGD",
        "momentum": f"{run.momentum:g}",
        "weight_decay": f"{run.weight_decay:g}",
        "batch": f"{run.batch}",
        "epochs": f"{run.epochs} a round",
        "learning_rate": f"{run.lr:g} to {run.lr_end:g}, exponentially, rounds counted from {run.lr_offset}",
        "server": _server(run),
        "rounds": f"{run.rounds}",
    }


def _partition(name: str) -> str:
    kind, _, alpha = name.partition(":")
    return {"lda": f"LDA, alpha {alpha}, shards of one size", "group": "by writer"}.get(kind, "evenly at random")


def _clients(run: Run) -> str:
    tiers = ", ".join(f"{share:.0%}" for share in run.task.tiers)
    classes = f", of device classes of {tiers}" if len(run.task.tiers) > 1 else ""
    return f"{run.task.clients:,}, {run.per_round} a round{classes}"


def _normalisation(dataset: str) -> str:
    mean, std = SOURCES[dataset].mean, SOURCES[dataset].std
    if dataset == "speech_commands":
        return "by mean and standard deviation of the training set's features"
    return "pixels in 0 to 1" if (mean, std) == (0, 1) else f"mean {mean:g}, standard deviation {std:g}"


def _server(run: Run) -> str:
    if isinstance(run.method, HeteroFLASH):
        return "the mean over the clients that hold a weight"
    step = getattr(run.method, "server", Average())
    if isinstance(step, Adam):
        return f"FedAdam, eta {step.eta:g}, decay rates {step.b1:g} and {step.b2:g}, tau {step.tau:g}"
    return "FedAvg: the mean over the round's clients"
