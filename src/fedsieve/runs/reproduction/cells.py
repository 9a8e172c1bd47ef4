"""The cells of a table or figure: the distinct runs behind its rows, for one row may stand in several tables.

FLASH's rows of Table 3 are those of its Table 2, and Speech Commands' of ZeroFL's Tables 1 and 3 differ in what is read
of the very same runs: a cell is run once, tested as often as any of its rows reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, TypeAlias

from fedsieve.engine import Run
from fedsieve.engine.federation import described
from fedsieve.recipes import apply_settings
from fedsieve.recipes.papers import PaperRun, Published
from fedsieve.recipes.papers.parts import PaperPart, paper_parts
from fedsieve.types import InputError

Variant: TypeAlias = Literal["", "authors", "subset"]
"""What a run is of its rows: they themselves, as the authors' public code has them, or on a part of their dataset."""


@dataclass(frozen=True, eq=False)
class PaperCell:
    """One run behind rows of the papers. The rows of the table or figure that was asked for stand first."""

    rows: tuple[PaperRun, ...]
    run: Run
    """With seed 0, tested as often as any row of any table reads."""
    measure: tuple[str, ...]
    name: str
    """The first row of all tables that it is: ``flash_table2/14``."""
    variant: Variant = ""
    changes: tuple[str, ...] = ()
    """What a variant sets besides."""

    @property
    def recipe(self) -> str:
        """The recipe that it is run by."""
        return self.rows[0].recipe

    @property
    def settings(self) -> tuple[str, ...]:
        """What is set of the recipe, the seed aside."""
        own = [text for text in self.rows[0].settings if not text.startswith("evaluate_every=")]
        return (*own, *self.changes, f"evaluate_every={self.run.evaluate_every}")

    @property
    def label(self) -> str:
        """What a person calls it: row and run."""
        name = " ".join(filter(None, [self.name, self.variant]))
        return " ".join([name, self.recipe, *(text.removeprefix("method.") for text in self.settings[:-1])])

    def as_variant(self, variant: Variant, changes: Sequence[str]) -> PaperCell:
        """Return the cell with ``changes`` of its settings, which makes it a variant of the rows, and none of them."""
        return replace(self, run=apply_settings(self.run, changes), variant=variant, changes=tuple(changes))

    def as_authors(self) -> PaperCell | None:
        """Return the cell as the authors' public code has it; None where it has it no other way."""
        changes = next((row.authors for row in self.rows if isinstance(row, Published) and row.authors), ())
        return self.as_variant("authors", changes) if changes else None

    def in_part(self, part: PaperPart) -> PaperCell:
        """Return the cell with the rows of ``part`` alone: what these need, not those of other tables."""
        rows = tuple(row for row in self.rows if row in part.runs)
        every = math.gcd(*(row.evaluate_every() for row in rows))
        return replace(self, rows=rows, run=replace(self.run, evaluate_every=every), measure=_measures(rows))


def cells_of(part: PaperPart, rows: Sequence[int] = ()) -> list[PaperCell]:
    """Return the cells of a table or figure, of the ``rows`` that are named by their numbers. Raises InputError."""
    numbers = {row.row for row in part.runs}
    if unknown := sorted(set(rows) - numbers):
        raise InputError(f"{part.label} has no row {unknown[0]}: its rows are {min(numbers)} to {max(numbers)}")
    keys = dict.fromkeys(run_key(row.run()) for row in part.runs if not rows or row.row in rows)
    return [_cells()[key] for key in keys]


def run_key(run: Run) -> str:
    """Return what tells a run from others, its seed and its tests aside."""
    return json.dumps(described(replace(run, seed=0, evaluate_every=1)), sort_keys=True)


@cache
def _cells() -> dict[str, PaperCell]:
    groups: dict[str, list[PaperRun]] = {}
    for part in paper_parts():
        for row in part.runs:
            groups.setdefault(run_key(row.run()), []).append(row)
    return {key: _cell(rows) for key, rows in groups.items()}


def _cell(rows: Sequence[PaperRun]) -> PaperCell:
    run = replace(rows[0].run(), evaluate_every=math.gcd(*(row.evaluate_every() for row in rows)))
    return PaperCell(tuple(rows), run, _measures(rows), rows[0].name)


def _measures(rows: Iterable[PaperRun]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for row in rows for name in row.measure))
