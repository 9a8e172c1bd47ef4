"""A run directory: its files, and all that they hold as one object, finished or not, or cut off in the middle of a row.

    run.json          how it was started (recipe, engine, device, kernels, precision, measure), by what and where
                      (version, commit, hardware), what the method says of itself (method, class, target_density),
                      every setting (run), the sha256 of the user's own files (source), and what changed while it
                      ran (changes)
    inputs.json       what the model takes and tells apart: an example's shape, mean and std, the classes
    partition.json    how many examples of each class every client holds
    source/           the user's own code (``provenance``), by the round from which on it was used
    rounds.jsonl      a row a round
    masks/            with --measure masks: every 20 rounds the positions of each layer's top weights
    checkpoints/      the server's state and the clients' memories after each of the last rounds (``resume``)
    summary.json      the rounds so far in numbers
    model.safetensors the deployed model
    loggers.json      with --log: by which ids the loggers know the run; tensorboard/ and wandb/ are theirs

Every file is written beside its place, synced, and renamed, so that a crash leaves the old one or the new one; rows
are appended and synced before their round's checkpoint, which has their hash. Nothing is ever unpickled.

A value of a ``RunRecord`` that is missing, or not a plausible number, is None: never a guess. A summary of fewer rounds
than were run is that of a run which goes on, and is passed over.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsieve.data.storage import LEAVE_OUT, object_of, read_file, read_json
from fedsieve.types import InputError

MANIFEST, INPUTS, PARTITION, ROWS = "run.json", "inputs.json", "partition.json", "rounds.jsonl"
SUMMARY, MODEL, CHECKPOINTS, MASKS, SOURCE = "summary.json", "model.safetensors", "checkpoints", "masks", "source"
LOGGERS = "loggers.json"
OTHER = "choose another --out"
PUT_BACK = f"put it back as it was, or {OTHER}"
SMALLEST, LARGEST = 1e-30, 1e30
"""Numbers beyond these are no measurement: their sums and quotients overflow."""
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
    def metrics(self) -> dict[str, bool]:
        """The metrics of the run's task, the first above all, and whether higher is better."""
        return metrics_of_manifest(self.manifest)

    @property
    def whole(self) -> bool:
        """Whether all planned rounds were run: a run stopped by ``--until`` has a summary too."""
        return self.summary is not None and str(self.last_round) == self.settings.get("rounds")

    @property
    def stopped(self) -> str:
        """The condition that ended the run before its last round (``--until``); empty if none did."""
        return str((self.summary or {}).get("stopped_because") or "")

    @property
    def ended(self) -> bool:
        """Whether all planned rounds were run, or a condition has ended the run."""
        return self.whole or bool(self.stopped)

    @property
    def last_round(self) -> int:
        """The last round that was run; a warm-up is round 0, or before."""
        return int(number(self.rows[-1].get("round")) or 0) if self.rows else 0

    @property
    def machine(self) -> dict[str, str]:
        """Version, engine, device and hardware, by name."""
        other = ("recipe", "run", "hardware", "method", "metrics", *DECLARED)
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
        totals = [(ms * steps, steps) for ms, steps in values if ms is not None and steps]
        return sum(total for total, _ in totals) / sum(steps for _, steps in totals) if totals else None

    def upload(self) -> float | None:
        """Return the mean bytes of one upload in training (a warm-up aside). None if a row does not say."""
        trained = [row for row in self.rows if row["round"] > 0]
        answers, sizes = [row.get("clients") for row in trained], [number(row.get("bytes_up")) for row in trained]
        count = sum(len(clients) for clients in answers if isinstance(clients, list))
        complete = count and None not in sizes and all(isinstance(one, list) for one in answers)
        return sum(size or 0 for size in sizes) / count if complete else None

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
        runs = f"its runs, {folder / 'runs'}/*" if (folder / "runs").is_dir() else "a folder that `fedsieve run` wrote"
        raise InputError(f"{folder} is not a run directory (no {MANIFEST}): name {runs}")
    return manifest


def metrics_of_manifest(manifest: Mapping[str, Any]) -> dict[str, bool]:
    """Return the metrics that ``run.json`` names, the first above all, and whether higher is better of each."""
    metrics = manifest.get("metrics")
    if not isinstance(metrics, Mapping) or not metrics:
        return {"accuracy": True}
    return {str(name): higher is not False for name, higher in metrics.items()}


def read_manifest(out: Path) -> dict[str, Any] | None:
    """Return ``run.json``, None where there is none. Raises InputError if it does not say what was run."""
    manifest = read_json(out / MANIFEST, PUT_BACK)
    if manifest is None:
        return None
    run, measure = manifest.get("run"), manifest.get("measure")
    if not (
        isinstance(run, dict)
        and type(run.get("rounds")) is int
        and isinstance(manifest.get("source"), dict)
        and isinstance(measure, list)
        and all(isinstance(name, str) for name in measure)
        and isinstance(manifest.get("kernels"), str)
        and _are_changes(manifest.get("changes"))
    ):
        raise InputError(f"{out / MANIFEST} does not say what was run: {PUT_BACK}")
    return manifest


def _are_changes(value: Any) -> bool:
    """Say whether a value is a list of changes, each from a round on, with rounds before and after."""
    return isinstance(value, list) and all(
        isinstance(one, dict)
        and type(one.get("round")) is int
        and ("rounds" not in one or (isinstance(one["rounds"], list) and [type(n) for n in one["rounds"]] == [int] * 2))
        for one in value
    )


def read_lines(out: Path, remedy: str = PUT_BACK) -> list[bytes]:
    """Return the lines of ``rounds.jsonl``; a last one that a crash tore off is left out. Raises InputError."""
    return (read_file(out / ROWS, remedy) or b"").split(b"\n")[:-1]


def read_rows(out: Path, remedy: str = PUT_BACK) -> list[dict[str, Any]]:
    """Return the rows of ``rounds.jsonl`` as they were written, each with its round. Raises InputError."""
    rows = []
    for number, line in enumerate(read_lines(out, remedy), start=1):
        row = object_of(line, f"{out / ROWS} line {number}", remedy)
        if type(row.get("round")) is not int:
            raise InputError(f"{out / ROWS} line {number} names no round: {remedy}")
        rows.append(row)
    return rows


def read_partition(out: Path) -> tuple[list[str], NDArray[np.float64] | None]:
    """Return classes and counts [clients, classes] of ``partition.json``, None where unknown. Raises InputError.

    Data without classes have none, and counts [clients, 1].
    """
    partition = read_json(out / PARTITION)
    if partition is None:
        return [], None
    with suppress(KeyError, TypeError, ValueError, OverflowError):
        classes = [str(name) for name in partition["classes"]]
        table = np.array(partition["counts"], dtype=np.float64)
        if not table.size:
            return classes, None
        if table.ndim == 2 and table.shape[1] == (len(classes) or 1) and ((table >= 0) & (table <= LARGEST)).all():
            return classes, table
    raise InputError(
        f"{out / PARTITION}: counts is not a number for each class of each client: restore the file, or remove it"
    )


def read_summary(out: Path) -> dict[str, Any] | None:
    """Return ``summary.json``, None where there is none. Raises InputError."""
    return read_json(out / SUMMARY, LEAVE_OUT)


def without_numbers(reason: str) -> str:
    """Return a reason in which all numbers are alike: reasons that differ in nothing else are of one kind."""
    return re.sub(r"\d[\d.,e+-]*", "#", reason)


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


def flatten_settings(node: Any, path: str = "") -> dict[str, Any]:
    """Return what nested objects of JSON hold, by dotted names."""
    if not isinstance(node, Mapping):
        return {path: node}
    items = [flatten_settings(value, f"{path}.{name}" if path else str(name)) for name, value in node.items()]
    return {name: value for item in items for name, value in item.items()}


def _as_texts(node: Any) -> dict[str, str]:
    """Return the values of nested objects of JSON as texts, by dotted names; of what is no object, nothing."""
    values = flatten_settings(node) if isinstance(node, dict) else {}
    return {key: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for key, v in values.items()}


def _counts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(n, int) for n in value.values())
