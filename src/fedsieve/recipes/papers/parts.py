"""The tables and figures of the papers by their names, each with the runs that it shows.

The runs of a table are its published rows. A figure shows runs whose curves are printed, but no number: they are listed
here, as recipes and settings. Where a figure does not print its dataset or partition, those of Table 2 (LDA 1.0) stand.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from fedsieve.recipes.papers import PaperRun, published
from fedsieve.types import InputError

PAPERS = {"zerofl": "ZeroFL", "flash": "FLASH", "sparsefedpp": "SparseFedPP"}
TITLES = {
    "zerofl_table1": "test accuracy and upload by sparsity, mask ratio and way to upload",
    "zerofl_table2": "CIFAR-10 with FedAdam",
    "zerofl_table3": "Speech Commands, the best within 300 rounds",
    "zerofl_figure1": "accuracy over rounds by sparsity, in one place and federated",
    "zerofl_figure2": "non-zero weights of each layer after aggregation",
    "zerofl_figure3": "where the top weights lie",
    "zerofl_figure4": "accuracy by mask ratio",
    "flash_table2": "NST, PDST and FLASH by density",
    "flash_table3": "accuracy and savings beside ZeroFL",
    "flash_table4": "hetero-FLASH",
    "flash_figure1": "accuracy by bytes and by density",
    "flash_figure2": "accuracy and mask mismatch over rounds",
    "flash_figure2_mnist": "Figure 2's curves on MNIST, which the paper does not show: minutes instead of days",
    "sparsefedpp_figure1": "accuracy by sparsity",
}
DRAWN = {"flash_figure2_mnist": "flash-2"}
"""The drawing (``report.figures``) of a figure that is not named like it."""


@dataclass(frozen=True)
class PaperPart:
    """A table or a figure of a paper: ``name`` is ``table2`` or ``figure2``."""

    paper: str
    name: str
    runs: tuple[PaperRun, ...]

    @property
    def label(self) -> str:
        """The paper and the name: ``flash table2``."""
        return f"{self.paper} {self.name}"

    @property
    def title(self) -> str:
        """What it shows."""
        return TITLES[f"{self.paper}_{self.name}"]

    @property
    def figure(self) -> str | None:
        """The drawing of it, as ``report.figures`` names it; None of a table."""
        if not self.name.startswith("figure"):
            return None
        whole = f"{self.paper}_{self.name}"
        return DRAWN.get(whole, whole.replace("_figure", "-"))


@cache
def paper_parts() -> tuple[PaperPart, ...]:
    """Return every table and figure, in the papers' order."""
    tables: dict[str, list[PaperRun]] = {name: [] for name in TITLES}
    for row in published():
        tables[_part_of(row.table)].append(row)
    for name, settings in FIGURE_RUNS.items():
        first = len(tables[name]) + 1
        own = [(recipe, tuple(texts), tuple(measure.split())) for recipe, texts, measure in settings]
        tables[name] += [PaperRun(name, i, r, s, measure=m) for i, (r, s, m) in enumerate(own, start=first)]
    names = {whole: whole.partition("_") for whole in tables}
    return tuple(PaperPart(paper, name, tuple(tables[whole])) for whole, (paper, _, name) in names.items())


def find_part(paper: str, name: str) -> PaperPart:
    """Return the table or figure of a paper. Raises InputError, which lists those that there are."""
    if paper not in PAPERS:
        raise InputError(f"there is no paper {paper!r}: choose {', '.join(PAPERS)}")
    own = {part.name: part for part in paper_parts() if part.paper == paper}
    if name not in own:
        raise InputError(f"{PAPERS[paper]} has no {name!r} of whole runs: choose {', '.join(own)}")
    return own[name]


def _part_of(table: str) -> str:
    """Return the part that a published row's table belongs to."""
    return {"zerofl_table2_fedadam": "zerofl_table2"}.get(table, table.replace("_fig1", "_figure1"))


Setting = tuple[str, list[str], str]
"""A recipe, what is set of it, and what is measured."""


def _zerofl_1() -> Iterable[Setting]:
    for sparsity in (0.7, 0.9, 0.95):
        own = [f"method.sparsity={sparsity}", "evaluate_every=10"]
        yield "swat.central_cifar10", own, ""
        yield from ((f"zerofl.cifar10_{split}", [*own, "method.upload=full"], "") for split in ("iid", "niid"))


def _zerofl_2() -> Iterable[Setting]:
    for top in (0.1, 0.3):
        settings = [f"method.sparsity={1 - top:g}", "method.upload=top_weights", "method.r_mask=0.0"]
        yield "zerofl.cifar10_niid", [*settings, "evaluate_every=100"], "masks"


def _zerofl_4() -> Iterable[Setting]:
    """Yield both panels: at 90 % sparsity a mask ratio of .9 sends everything."""
    for sparsity in (0.9, 0.95):
        for upload in ("top_weights", "diff_of_top", "top_diff"):
            for r_mask in range(1, 10):
                own = [f"method.sparsity={sparsity}", f"method.upload={upload}", f"method.r_mask={r_mask / 10}"]
                yield "zerofl.cifar10_niid", [*own, "evaluate_every=700"], ""


def _flash_1() -> Iterable[Setting]:
    often = "evaluate_every=10"
    yield "fedavg.flash_cifar10", [often], ""
    for sparsity in (0.9, 0.95):
        upload = ["method.upload=top_weights", "method.r_mask=0.2"]
        yield "zerofl.cifar10_niid", [f"method.sparsity={sparsity}", *upload, often], ""
    for density in (0.1, 0.05):
        yield "flash.cifar10_niid", [f"method.density={density}", often], ""


def _flash_2(dense: str, sparse: str, central: str) -> Iterable[Setting]:
    yield dense, ["evaluate_every=10"], ""
    for density in (0.1, 0.05):
        yield sparse, [f"method.density={density}", "evaluate_every=10"], "masks"
        yield central, [f"method.density={density}", "evaluate_every=1"], "masks"


FIGURE_RUNS = {
    "zerofl_figure1": [*_zerofl_1()],
    "zerofl_figure2": [*_zerofl_2()],
    "zerofl_figure3": [*_zerofl_2()][:1],
    "zerofl_figure4": [*_zerofl_4()],
    "flash_figure1": [*_flash_1()],
    "flash_figure2": [*_flash_2("fedavg.flash_cifar10", "nst.cifar10_niid", "dnr.central_cifar10")],
    "flash_figure2_mnist": [*_flash_2("fedavg.mnist", "nst.mnist", "dnr.central_mnist")],
}
