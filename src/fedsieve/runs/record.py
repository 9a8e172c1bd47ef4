"""A run directory as one object: finished or not, whole or cut off in the middle of a row.

Its files are those of ``schema``. A value that is missing, or not a plausible number, is None: never a guess.
A summary of fewer rounds than were run is that of a run which goes on, and is passed over.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsieve.data.storage import LEAVE_OUT, read_json
from fedsieve.runs.schema import (
    LARGEST,
    MANIFEST,
    SMALLEST,
    flatten_settings,
    read_partition,
    read_rows,
    read_summary,
)
from fedsieve.types import InputError

DECLARED = ("class", "target_density")
"""What run.json says of the method beside its fields."""


@dataclass(frozen=True)
class RunRecord:
    """One run: ``summary`` is None unless it covers all ``rows``, ``counts`` [clients, classes] None where unknown."""

    folder: Path
    manifest: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any] | None
    classes: list[str]
    counts: NDArray[np.float64] | None
    label: str = ""
    """What a page calls the run's configuration."""
    look: int | None = None
    """The place of its configuration among the looks of a page's lines."""

    @property
    def recipe(self) -> str:
        """The recipe that ran."""
        return str(self.manifest.get("recipe") or self.folder.name)

    @property
    def settings(self) -> dict[str, str]:
        """Every field of the run, by its dotted name."""
        return _as_texts(self.manifest.get("run"))

    @property
    def target(self) -> float | None:
        """The density that the method says it aims at; None where it says nothing."""
        density = number(self.manifest.get("target_density"))
        return round(density, 12) if density is not None and 0 < density <= 1 else None

    @property
    def whole(self) -> bool:
        """Whether all planned rounds were run: a run stopped by ``--until`` has a summary too."""
        return self.summary is not None and str(self.last_round) == self.settings.get("rounds")

    @property
    def last_round(self) -> int:
        """The last round that was run; a warm-up is round 0."""
        return int(number(self.rows[-1].get("round")) or 0) if self.rows else 0

    @property
    def machine(self) -> dict[str, str]:
        """Version, engine, device and hardware, by name."""
        other = ("recipe", "run", "hardware", "method", *DECLARED)
        plain = {key: value for key, value in self.manifest.items() if key not in other}
        return _as_texts(plain) | _as_texts(self.manifest.get("hardware"))

    @property
    def declared(self) -> dict[str, str]:
        """What the method says of itself beside its fields."""
        declared = {"class": self.manifest.get("class"), "target_density": self.target and f"{self.target:g}"}
        return _as_texts({"method": {key: value for key, value in declared.items() if value is not None}})

    @property
    def method(self) -> str:
        """The method with its first plain hyper-parameters, such as ``ZeroFL(sparsity=0.9, r_mask=0.1)``."""
        fields = {
            key[7:].removesuffix(".kind"): value for key, value in self.settings.items() if key.startswith("method.")
        }
        kind = fields.pop("kind", "")
        return f"{kind}({', '.join(f'{key}={value}' for key, value in list(fields.items())[:4])})" if kind else ""

    def series(self, name: str, scale: float = 1) -> tuple[list[float], list[float]]:
        """Return the rounds that measured ``name``, and what they measured."""
        values = [(row["round"], value) for row in self.rows if (value := number(row.get(name))) is not None]
        return [t for t, _ in values], [value * scale for _, value in values]

    def final(self, name: str) -> float | None:
        """Return the summary's value of ``name``, None while there is none."""
        return number((self.summary or {}).get(name))

    def last(self, name: str) -> float | None:
        """Return a measure at the end: the summary's, or the latest of the rows."""
        final, (_, values) = self.final(name), self.series(name)
        return final if final is not None else values[-1] if values else None

    def total(self, name: str) -> float | None:
        """Return a sum over the rounds: the summary's, or what the rows so far add up to."""
        final, (_, values) = self.final(name), self.series(name)
        return final if final is not None else sum(values) if values else None

    @property
    def kernels(self) -> Counter[str]:
        """How many clients trained which way."""
        each = (row.get("kernels") for row in self.rows)
        return sum((Counter(one) for one in each if _counts(one)), Counter[str]())

    @property
    def measured(self) -> dict[str, dict[str, Any]]:
        """A training step each way, where it was measured."""
        both = (self.summary or {}).get("kernels_measured")
        return {way: of for way, of in both.items() if isinstance(of, dict)} if isinstance(both, dict) else {}

    def step(self) -> float | None:
        """Return the mean milliseconds of a training step, as far as the run has got."""
        values = [(number(row.get("ms_per_step")), number(row.get("steps"))) for row in self.rows]
        counted = [(ms * steps, steps) for ms, steps in values if ms is not None and steps]
        return sum(total for total, _ in counted) / sum(steps for _, steps in counted) if counted else None

    def upload(self) -> float | None:
        """Return the mean bytes of one upload in training (a warm-up aside). None if a row does not say."""
        trained = [row for row in self.rows if row.get("round") != 0]
        answers, sent = [row.get("clients") for row in trained], [number(row.get("bytes_up")) for row in trained]
        count = sum(len(clients) for clients in answers if isinstance(clients, list))
        complete = count and None not in sent and all(isinstance(one, list) for one in answers)
        return sum(size or 0 for size in sent) / count if complete else None

    def refused(self) -> Counter[str]:
        """Return how many updates were refused, by reason."""
        every = (one for row in self.rows if isinstance(row.get("refused"), list) for one in row["refused"])
        return Counter(str(one.get("reason")) if isinstance(one, dict) else str(one) for one in every)


def read_record(folder: Path) -> RunRecord:
    """Return what a run directory holds; InputError names the file that is missing or broken, and the remedy.

    A round that was run again counts as it was last written.
    """
    manifest = require_manifest(folder)
    classes, counts = read_partition(folder)
    rows = {row["round"]: row for row in read_rows(folder, LEAVE_OUT)}
    summary = read_summary(folder)
    run = RunRecord(folder, manifest, [rows[t] for t in sorted(rows)], summary, classes, counts)
    current = summary is not None and number(summary.get("rounds")) == run.last_round
    return run if current else replace(run, summary=None)


def require_manifest(folder: Path) -> dict[str, Any]:
    """Return ``run.json``; InputError says that the folder holds no run."""
    manifest = read_json(folder / MANIFEST)
    if manifest is None:
        raise InputError(f"{folder} is not a run directory (no {MANIFEST}): name a folder that `fedsieve run` wrote")
    return manifest


def format_kernels(kernels: Mapping[str, int]) -> str:
    """Return which way clients trained: ``sparse``, ``dense``, or how many each, ``sparse 30, dense 7``."""
    return ", ".join(kernels) if len(kernels) < 2 else ", ".join(f"{way} {n}" for way, n in kernels.items())


def number(value: Any) -> float | None:
    """Return ``value`` if it is a number that a run can have measured: zero, or from 1e-30 to 1e30 either way."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return value if plain and (value == 0 or SMALLEST <= abs(value) <= LARGEST) else None


def numeric(text: str) -> float | None:
    """Return the number that a setting says, or the largest of several."""
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
        values = [number(one) for one in (value if isinstance(value, list) else [value])]
        return max((one for one in values if one is not None), default=None)
    return None


def _as_texts(node: Any) -> dict[str, str]:
    """Return the values of nested objects of JSON as texts, by dotted names; of what is no object, nothing."""
    values = flatten_settings(node) if isinstance(node, dict) else {}
    return {key: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for key, v in values.items()}


def _counts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(n, int) for n in value.values())
