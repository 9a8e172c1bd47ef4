"""The papers' result tables, each row as the recipe and settings that run it here.

The CSV files beside this one hold the numbers as printed; their README names the papers.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache
from pathlib import Path

from fedsieve.engine import Run
from fedsieve.recipes import load_recipe

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Published:
    """One number that a paper prints: accuracy and spread in percent; None is what it does not say."""

    table: str
    row: int
    """Its number within the table, from 1."""
    recipe: str
    settings: tuple[str, ...]
    accuracy: float
    std: float | None = None
    upload_mb: float | None = None
    """ZeroFL's, of 1,024,000 bytes."""
    savings: float | None = None
    """FLASH's: how many times less than dense is sent."""
    variant: bool = False
    """Whether the paper ran an implementation that differs from the method's own paper, and from this one."""

    @property
    def name(self) -> str:
        """The table and the number of the row in it."""
        return f"{self.table}/{self.row}"

    @property
    def command(self) -> str:
        """The command line that runs this row."""
        return " ".join(["fedsieve run", self.recipe, *(f"-s {setting}" for setting in self.settings)])

    def run(self) -> Run:
        """Return the run of this row: seed 0, tested every round."""
        return replace(load_recipe(self.recipe, self.settings), seed=0, evaluate_every=1)


@cache
def published() -> tuple[Published, ...]:
    """Return every row of every table, in the order of the files."""
    tables: dict[str, list[Published]] = {}
    for row in (*_zerofl(), *_flash(), *_sparsefedpp()):
        rows = tables.setdefault(row.table, [])
        rows.append(replace(row, row=len(rows) + 1))
    return tuple(row for rows in tables.values() for row in rows)


def published_of(run: Run) -> Published | None:
    """Return the first published row that is exactly this run, which has seed 0 and is tested every round."""
    return next((row for row, known in _runs() if known == run), None)


@cache
def _runs() -> tuple[tuple[Published, Run], ...]:
    return tuple((row, row.run()) for row in published())


def _rows(file: str) -> list[dict[str, str]]:
    with (HERE / file).open(newline="") as opened:
        return list(csv.DictReader(opened))


def _number(text: str) -> float | None:
    return float(text) if text else None


def _zerofl() -> Iterator[Published]:
    """Yield ZeroFL's rows: Table 2 steps by FedAdam, Table 3 runs 300 rounds, FEMNIST has all writers."""
    for row in _rows("zerofl.csv"):
        dataset = {"speech_commands": "speech"}.get(row["dataset"], row["dataset"])
        settings = [f"method.sparsity={row['sparsity']}", f"method.upload={row['upload']}"]
        settings += [f"method.r_mask={row['mask_ratio']}"] if row["mask_ratio"] else []
        settings += ["method.server=adam"] if row["table"].endswith("fedadam") else []
        settings += [f"rounds={row['rounds']}"] if row["table"] == "zerofl_table3" else []
        settings += ["task.clients=3597"] if dataset == "femnist" else []
        recipe = f"zerofl.{dataset}" if dataset == "femnist" else f"zerofl.{dataset}_{row['split']}"
        mean, std, mb = (_number(row[name]) for name in ("accuracy_mean", "accuracy_std", "upload_mb"))
        assert mean is not None
        yield Published(row["table"], 0, recipe, tuple(settings), mean, std, upload_mb=mb)


def _flash() -> Iterator[Published]:
    """Yield FLASH's rows: its own settings for every dataset, dense training too."""
    for row in _rows("flash.csv"):
        method, dataset, split = row["method"], row["dataset"], row["split"]
        if method == "dense":
            recipe = "fedavg.mnist" if dataset == "mnist" else f"fedavg.flash_{dataset}"
            settings = [f"task.partition={split}"] if dataset != "femnist" else []
        else:
            recipe, settings = _split(method, dataset, split)
            many = row["density"].replace("/", ",")
            settings.append(f"method.densities={many}" if method == "hetero_flash" else f"method.density={many}")
        settings += ["task.clients=3400"] if dataset == "femnist" else []
        mean, std, savings = (_number(row[name]) for name in ("accuracy_mean", "accuracy_std", "savings"))
        assert mean is not None
        yield Published(row["table"], 0, recipe, tuple(settings), mean, std, savings=savings)


def _sparsefedpp() -> Iterator[Published]:
    """Yield SparseFedPP's rows, all on CIFAR-10 at its settings; ZeroFL and FLASH are its own variants there."""
    for row in _rows("sparsefedpp.csv"):
        method, _, variant = row["method"].partition("_")
        if method in ("topk", "sparsefedpp"):
            recipe, settings = _split(method, "cifar10", row["split"])
        else:
            recipe = f"{'fedavg' if method == 'dense' else method}.sparsefedpp_cifar10"
            settings = [f"task.partition={row['split']}"]
        if method == "flash":
            settings.append(f"method.density={1 - Decimal(row['sparsity'])}")
        elif method != "dense":
            settings.append(f"method.sparsity={row['sparsity']}")
        yield Published("sparsefedpp_fig1", 0, recipe, tuple(settings), float(row["accuracy"]), variant=bool(variant))


def _split(method: str, dataset: str, split: str) -> tuple[str, list[str]]:
    """Return the recipe nearest to a partition, and the setting that gives exactly it."""
    if dataset == "femnist":
        return f"{method}.femnist", []
    if dataset == "mnist":
        return f"{method}.mnist", [f"task.partition={split}"] if split != "lda:1.0" else []
    if split == "lda:1000":
        return f"{method}.{dataset}_iid", []
    return f"{method}.{dataset}_niid", [f"task.partition={split}"] if split != "lda:1.0" else []
