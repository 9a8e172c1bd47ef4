"""How the papers lay their tables out: what names a row, the columns of numbers, and what is printed beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from fedsieve.recipes.papers import Published
from fedsieve.recipes.papers.parts import PaperPart
from fedsieve.types import InputError

Text: TypeAlias = Callable[[Published], str]
DATASETS = {"mnist": "MNIST", "cifar10": "CIFAR-10", "femnist": "FEMNIST", "speech_commands": "Speech Commands"}
METHODS = {"zerofl": "ZeroFL", "flash": "FLASH"}
DASH, NOTHING = "–", "—"


@dataclass(frozen=True)
class TableLayout:
    """A table: ``stubs`` name the row, ``column`` chooses one of ``columns`` (their titles from outer to inner)."""

    stubs: Mapping[str, Text]
    columns: Mapping[str, tuple[str, ...]]
    column: Text
    beside: Mapping[str, Text] = field(default_factory=dict)
    """Further numbers that are printed once for a row."""


def layout_of(part: PaperPart) -> TableLayout:
    """Return how a part is laid out. Raises InputError for a figure without printed numbers."""
    layout = LAYOUTS.get(f"{part.paper}_{part.name}")
    if layout is None:
        raise InputError(f"{part.label} prints no numbers: draw it, it is a figure")
    return layout


def _key(name: str, words: Mapping[str, str] | None = None) -> Text:
    """Return what the CSV file says in a column, in words where there are any."""
    return lambda row: (words or {}).get(row.keys[name], row.keys[name])


def _percent(row: Published) -> str:
    return f"{100 * float(row.keys['sparsity']):g} %"


def _mask_ratio(row: Published) -> str:
    return row.keys["mask_ratio"] or NOTHING


def _clients(row: Published) -> str:
    clients = {"femnist": 3597}.get(row.keys["dataset"], 100)
    return f"{DATASETS[row.keys['dataset']]} ({clients} clients)"


def _distribution(row: Published) -> str:
    alpha = row.keys["split"].removeprefix("lda:")
    return {"natural": "non-IID", "1000": "IID (α = 1000)"}.get(alpha, f"non-IID (α = {alpha})")


def _times(name: str) -> Text:
    """Return the savings that a column of the CSV file says, as printed."""
    return lambda row: f"{row.keys[name]}×"


UPLOADS = {
    "full": "Full Model",
    "top_weights": "Top-K-W.",
    "diff_of_top": "Diff. Top-K-W.",
    "top_diff": "Top-K-W. Diff",
}
SPLITS = {"iid": "IID", "niid": "NIID"}
ZEROFL_STUBS: dict[str, Text] = {"Sp Level": _percent, "Mask Ratio": _mask_ratio}
ZEROFL_BESIDE: dict[str, Text] = {
    "File Size": lambda row: row.keys["upload_mb"] or DASH,
    "Comms. Savings": _times("savings_up"),
}
ZEROFL = TableLayout(
    {"Dataset": _clients, **ZEROFL_STUBS},
    {f"{upload} {split}": (title, SPLITS[split]) for upload, title in UPLOADS.items() for split in SPLITS},
    lambda row: f"{row.keys['upload']} {row.keys['split'].replace('natural', 'niid')}",
    ZEROFL_BESIDE,
)
FLASH_STUBS: dict[str, Text] = {"Dataset": _key("dataset", DATASETS), "Data Distribution": _distribution}
DENSITY: dict[str, Text] = {"Density (d)": _key("density")}

LAYOUTS = {
    "zerofl_table1": ZEROFL,
    "zerofl_table2": TableLayout(
        {"Sparsity Level": _percent, "Mask Ratio": _mask_ratio},
        {upload: (title, "NIID") for upload, title in UPLOADS.items()},
        _key("upload"),
        ZEROFL_BESIDE,
    ),
    "zerofl_table3": TableLayout(ZEROFL_STUBS, ZEROFL.columns, ZEROFL.column, ZEROFL_BESIDE),
    "zerofl_figure1": TableLayout({"Sp Level": _percent}, {"central": ("SWAT, centralised, %",)}, _key("split")),
    "flash_table2": TableLayout(
        FLASH_STUBS | DENSITY,
        {"dense": ("Baseline Acc %",), "nst": ("NST Acc %",), "pdst": ("PDST Acc %",), "flash": ("FLASH Acc %",)},
        _key("method"),
    ),
    "flash_table3": TableLayout(
        FLASH_STUBS | {"Method": _key("method", METHODS), "Density": _key("density")},
        {"": ("Acc %",)},
        lambda row: "",
        {"Down-link Savings": _times("savings_down"), "Up-link Savings": _times("savings_up")},
    ),
    "flash_table4": TableLayout(
        FLASH_STUBS | {"Max Client Density": lambda row: row.keys["density"].partition("/")[0]},
        {"": ("Hetero-FLASH Acc %",)},
        lambda row: "",
    ),
    "sparsefedpp_figure1": TableLayout(
        {"Data Distribution": _distribution, "Sparsity": _key("sparsity")},
        {
            "dense": ("Dense",),
            "topk": ("Top-k",),
            "zerofl_variant": ("ZeroFL (the authors' variant)",),
            "flash_variant": ("FLASH (the authors' variant)",),
            "sparsefedpp": ("SparseFedPP",),
        },
        _key("method"),
    ),
}
