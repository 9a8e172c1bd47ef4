"""The papers' result tables, each row as the recipe and settings that run it here, and its protocol.

The CSV files beside this one hold the numbers as printed, ``protocols.toml`` what the papers say of how those came
about; the README names the papers.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cache
from pathlib import Path

from fedsieve.engine import Run
from fedsieve.recipes import load_recipe
from fedsieve.recipes.papers.authors import authors_settings
from fedsieve.recipes.papers.protocol import Reading, Statement, protocol_terms, statement

HERE = Path(__file__).parent


@dataclass(frozen=True)
class PaperRun:
    """A run that a table or a figure of a paper shows: a recipe and what is set of it."""

    table: str
    """The table or figure, with its paper: ``flash_table2``, ``flash_figure2``."""
    row: int
    """Its number within the table, from 1."""
    recipe: str
    settings: tuple[str, ...]
    measure: tuple[str, ...] = field(default=(), kw_only=True)
    """What is to be measured on the way (``engine.measures``)."""

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

    def evaluate_every(self) -> int:
        """Return how seldom the run may be tested."""
        return load_recipe(self.recipe, self.settings).evaluate_every


@dataclass(frozen=True)
class Published(PaperRun):
    """One number that a paper prints: accuracy and spread in percent; None is what it does not say."""

    accuracy: float
    std: float | None = None
    upload_mb: float | None = None
    """ZeroFL's, of 1,024,000 bytes."""
    savings_up: float | None = None
    """How many times less than dense is sent up."""
    savings_down: float | None = None
    """FLASH's: how many times less than dense is sent down."""
    reading: Reading = Reading()
    """Which of a run's accuracies it is."""
    quoted: str = ""
    """The table that the paper has the number from, with its protocol; empty: its own."""
    variant: bool = False
    """Whether the paper ran an implementation that differs from the method's own paper, and from this one."""
    authors: tuple[str, ...] = ()
    """The settings, applied after its own, of a run that does what the authors' public code does where that differs
    from the paper; empty: it does not, or none is known."""
    keys: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Where the number stands in the table, by the columns of the CSV file: ``{"split": "iid", "upload": "full"}``."""

    @property
    def printed(self) -> str:
        """The number with its spread, and what the paper says is saved up and down."""
        spread = "" if self.std is None else f" ± {self.std:.2f}"
        savings = {"up": self.savings_up, "down": self.savings_down}
        saved = [f"{value:g}x {way}" for way, value in savings.items() if value is not None]
        return f"{self.accuracy:.2f}{spread}" + (f", {' and '.join(saved)}" if saved else "")

    @property
    def authors_command(self) -> str:
        """The command line that runs this row as the authors' code does; empty where that is no other run."""
        return " ".join([self.command, *map("-s {}".format, self.authors)]) if self.authors else ""

    @property
    def says(self) -> Statement:
        """What the paper says of the data, the seeds and the protocol."""
        return statement(self.quoted or self.table, str(self.run().task.dataset))

    @property
    def protocol(self) -> dict[str, str]:
        """Every term of the protocol as a text: "not printed" where the paper is silent, and what was chosen."""
        return protocol_terms(self.run(), self.reading, self.says)

    def evaluate_every(self) -> int:
        """Return how seldom the run may be tested."""
        return self.reading.evaluate_every(self.run().rounds)


@cache
def published() -> tuple[Published, ...]:
    """Return every row of every table, in the order of the files."""
    tables: dict[str, list[Published]] = {}
    zerofl = [*_zerofl()]
    for row in (*zerofl, *_flash(zerofl), *_sparsefedpp()):
        rows = tables.setdefault(row.table, [])
        authors = () if row.quoted or row.variant else authors_settings(row.table, row.recipe)
        rows.append(replace(row, row=len(rows) + 1, authors=authors))
    return tuple(row for rows in tables.values() for row in rows)


def rows_by_protocol() -> dict[str, tuple[dict[str, str], list[Published]]]:
    """Return the rows of each table on each dataset, and their protocol; where a term differs, all that it is."""
    groups: dict[str, list[Published]] = {}
    for row in published():
        quoted = f", quoted from {row.quoted}" if row.quoted else ""
        groups.setdefault(f"{row.table}, {row.run().task.dataset}{quoted}", []).append(row)
    return {title: (_joined([row.protocol for row in rows]), rows) for title, rows in groups.items()}


def authors_by_method(rows: list[Published]) -> dict[str, str]:
    """Return the methods of some rows, joined by commas, each with what the authors' code adds to their commands."""
    methods: dict[str, list[str]] = {}
    for row in rows:
        if row.authors:
            methods.setdefault(" ".join(map("-s {}".format, row.authors)), []).append(row.recipe.partition(".")[0])
    return {", ".join(dict.fromkeys(names)): settings for settings, names in methods.items()}


def _joined(protocols: list[dict[str, str]]) -> dict[str, str]:
    return {term: "; or ".join(dict.fromkeys(one[term] for one in protocols)) for term in protocols[0]}


def _rows(file: str) -> list[dict[str, str]]:
    with (HERE / file).open(newline="") as opened:
        return list(csv.DictReader(opened))


def _number(text: str) -> float | None:
    return float(text) if text else None


def _zerofl() -> Iterator[Published]:
    """Yield ZeroFL's rows: Table 2 steps by FedAdam, FEMNIST has all writers; speech runs 300 rounds.

    Of those Table 1 reads the accuracy in round 200, Table 3 the highest. In Fig. 1 SWAT trains in one place.
    """
    for row in _rows("zerofl.csv"):
        if row["split"] == "central":
            settings = (f"method.sparsity={row['sparsity']}",)
            accuracy, reading = float(row["accuracy_mean"]), Reading(data="validation")
            recipe = "swat.central_cifar10"
            yield Published(row["table"], 0, recipe, settings, accuracy, reading=reading, keys=row)
        else:
            yield _federated_zerofl(row)


def _federated_zerofl(row: dict[str, str]) -> Published:
    dataset = {"speech_commands": "speech"}.get(row["dataset"], row["dataset"])
    settings = [f"method.sparsity={row['sparsity']}", f"method.upload={row['upload']}"]
    settings += [f"method.r_mask={row['mask_ratio']}"] if row["mask_ratio"] else []
    settings += ["method.server=adam"] if row["table"].endswith("fedadam") else []
    settings += ["rounds=300"] if dataset == "speech" else []
    settings += ["task.clients=3597"] if dataset == "femnist" else []
    recipe = f"zerofl.{dataset}" if dataset == "femnist" else f"zerofl.{dataset}_{row['split']}"
    at = Reading("at", int(row["rounds"])) if dataset == "speech" else Reading()
    reading = Reading("best") if row["table"] == "zerofl_table3" else at
    settings += ["evaluate_every=1"] if reading.kind == "best" else []
    std, mb, savings = (_number(row[name]) for name in ("accuracy_std", "upload_mb", "savings_up"))
    mean = float(row["accuracy_mean"])
    return Published(row["table"], 0, recipe, tuple(settings), mean, std, mb, savings, reading=reading, keys=row)


def _flash(zerofl: list[Published]) -> Iterator[Published]:
    """Yield FLASH's rows: its own settings for every dataset, dense training too; ZeroFL's are of its Table 1."""
    for row in _rows("flash.csv"):
        method, dataset, split = row["method"], row["dataset"], row["split"]
        mean = float(row["accuracy_mean"])
        std, up, down = (_number(row[name]) for name in ("accuracy_std", "savings_up", "savings_down"))
        if method == "zerofl":
            first = next(one for one in zerofl if (one.accuracy, one.std) == (mean, std))
            yield replace(first, table=row["table"], quoted=first.table, savings_up=up, savings_down=down, keys=row)
            continue
        if method == "dense":
            recipe = "fedavg.mnist" if dataset == "mnist" else f"fedavg.flash_{dataset}"
            settings = [f"task.partition={split}"] if dataset != "femnist" else []
        else:
            recipe, settings = _split(method, dataset, split)
            many = row["density"].replace("/", ",")
            settings.append(f"method.densities={many}" if method == "hetero_flash" else f"method.density={many}")
        settings += ["task.clients=3400"] if dataset == "femnist" else []
        yield Published(row["table"], 0, recipe, tuple(settings), mean, std, savings_up=up, savings_down=down, keys=row)


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
        accuracy = float(row["accuracy"])
        yield Published("sparsefedpp_fig1", 0, recipe, tuple(settings), accuracy, variant=bool(variant), keys=row)


def _split(method: str, dataset: str, split: str) -> tuple[str, list[str]]:
    """Return the recipe nearest to a partition, and the setting that gives exactly it."""
    if dataset == "femnist":
        return f"{method}.femnist", []
    if dataset == "mnist":
        return f"{method}.mnist", [f"task.partition={split}"] if split != "lda:1.0" else []
    if split == "lda:1000":
        return f"{method}.{dataset}_iid", []
    return f"{method}.{dataset}_niid", [f"task.partition={split}"] if split != "lda:1.0" else []
