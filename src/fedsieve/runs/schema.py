"""The files of a run directory: what each holds, written and read by the functions of this module.

    run.json          how it was started (recipe, engine, device, kernels, measure), by what and where (version, commit,
                      hardware), what the method says of itself (method, class, target_density), every setting (run),
                      the sha256 of the user's own files (source), and what changed while it ran (changes)
    inputs.json       what the model takes and tells apart: an example's shape, mean and std, the classes
    partition.json    how many examples of each class every client holds
    source/           the user's own code (``source``), by the round from which on it was used
    rounds.jsonl      a row a round
    masks/            with --measure masks: every 20 rounds the positions of each layer's top weights
    checkpoints/      the server's state and the clients' memories after each of the last rounds (``checkpoints``)
    summary.json      the rounds so far in numbers
    model.safetensors the deployed model

Every file is written beside its place, synced, and renamed, so that a crash leaves the old one or the new one; rows
are appended and synced before their round's checkpoint, which has their hash. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsieve.client.process import peak_memory_mb
from fedsieve.data import Dataset
from fedsieve.data.partition import counts
from fedsieve.data.storage import LEAVE_OUT, object_of, read_file, read_json
from fedsieve.engine import Federation, Round
from fedsieve.engine.federation import described
from fedsieve.runs.environment import describe_environment
from fedsieve.runs.execution import Execution
from fedsieve.types import InputError

MANIFEST, INPUTS, PARTITION, ROWS = "run.json", "inputs.json", "partition.json", "rounds.jsonl"
SUMMARY, MODEL, CHECKPOINTS, MASKS, SOURCE = "summary.json", "model.safetensors", "checkpoints", "masks", "source"
OTHER = "choose another --out"
PUT_BACK = f"put it back as it was, or {OTHER}"
SMALLEST, LARGEST = 1e-30, 1e30
"""Numbers beyond these are no measurement: their sums and quotients overflow."""
NOT_IN_ROWS = {"t", "state", "model", "memory", "norms", "lengths", "rollbacks", "metrics", "measures", "positions"}
"""The fields of a ``Round`` that are no columns of its row: ``t`` is ``round`` there, metrics and measures its own."""


def manifest_of(federation: Federation, recipe: str, execution: Execution, source: Mapping[str, str]) -> dict[str, Any]:
    """Return ``run.json`` of a new run; ``source`` has the sha256 of every file of the user's own code."""
    run, method = federation.run, federation.run.method
    start = {"recipe": recipe, "engine": execution.engine, "device": execution.device, "kernels": execution.kernels}
    about = {"method": method.name, "class": described(type(method)), "target_density": run.target_density}
    about |= {"measure": list(federation.measure), "run": described(run)}
    json.dumps(about, default=_unwritable)
    return start | describe_environment() | about | {"source": dict(source), "changes": []}


def _unwritable(value: object) -> None:
    raise InputError(
        f"a field of the run or its method holds {type(value).__name__}, which {MANIFEST} cannot: give numbers, texts, "
        "lists, functions or dataclasses of them"
    )


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


def flatten_settings(node: Any, path: str = "") -> dict[str, Any]:
    """Return what nested objects of JSON hold, by dotted names."""
    if not isinstance(node, Mapping):
        return {path: node}
    items = [flatten_settings(value, f"{path}.{name}" if path else str(name)) for name, value in node.items()]
    return {name: value for item in items for name, value in item.items()}


def recorded_kernels(out: Path) -> str | None:
    """Return the kernels that a directory's run was begun with; None if it holds none. Raises InputError."""
    manifest = read_manifest(out)
    return None if manifest is None else str(manifest["kernels"])


def row_of(round: Round) -> dict[str, Any]:
    """Return a round as the row that ``rounds.jsonl`` holds. Raises InputError for a metric named like a column."""
    row = {"round": round.t} | {f.name: getattr(round, f.name) for f in fields(round) if f.name not in NOT_IN_ROWS}
    row |= {name: [asdict(one) for one in getattr(round, name)] for name in ("refused", "warnings", "left_out")}
    row["clients"] = list(round.clients)
    if taken := sorted(row.keys() & round.metrics.keys()):
        raise InputError(f"a client's metric has the name of a column of {ROWS} ({', '.join(taken)}): rename it")
    return row | dict(round.metrics) | dict(round.measures)


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


def inputs_of(dataset: Dataset) -> dict[str, Any]:
    """Return ``inputs.json``: what a model of a dataset takes and tells apart."""
    train = dataset.train
    return {"classes": dataset.classes, "shape": train.x.shape[1:], "mean": train.mean, "std": train.std}


def partition_of(federation: Federation) -> dict[str, Any]:
    """Return ``partition.json``: the classes, and of every client how many training examples of each it holds."""
    dataset = federation.dataset
    table = counts(list(federation.shards), dataset.train.y, len(dataset.classes))
    return {"classes": list(dataset.classes), "counts": table.tolist()}


def read_partition(out: Path) -> tuple[list[str], NDArray[np.float64] | None]:
    """Return classes and counts [clients, classes] of ``partition.json``, None where unknown. Raises InputError."""
    partition = read_json(out / PARTITION)
    if partition is None:
        return [], None
    with suppress(KeyError, TypeError, ValueError, OverflowError):
        classes = [str(name) for name in partition["classes"]]
        table = np.array(partition["counts"], dtype=np.float64)
        if not table.size:
            return classes, None
        if table.ndim == 2 and table.shape[1] == len(classes) and ((table >= 0) & (table <= LARGEST)).all():
            return classes, table
    raise InputError(
        f"{out / PARTITION}: counts is not a number for each class of each client: restore the file, or remove it"
    )


def summary_of(rows: list[dict[str, Any]], federation: Federation) -> dict[str, Any]:
    """Return ``summary.json``: sums over the rounds so far, the last test, and what one upload weighs in training."""
    method = federation.run.method
    sums = ("bytes_up", "bytes_down", "bytes_dense_up", "bytes_dense_down", "multiply_adds", "multiply_adds_dense")
    tested = [r["accuracy"] for r in rows if r["accuracy"] is not None]
    validated = [v for r in rows if (v := r["accuracy_validation"]) is not None]
    pruned = [r["accuracy_pruned"] for r in rows if "accuracy_pruned" in r]
    trained = [r for r in rows if r["round"] > 0]
    steps = sum(r["steps"] for r in rows)
    return {
        "method": method.name,
        "dataset": federation.dataset.name,
        "rounds": rows[-1]["round"],
        "accuracy": tested[-1] if tested else None,
        "accuracy_validation": validated[-1] if validated else None,
        **({"accuracy_pruned": pruned[-1]} if pruned else {}),
        "density": rows[-1]["density"],
        "density_of_all": rows[-1]["density_of_all"],
        **{name: sum(r[name] for r in rows) for name in (*sums, "seconds")},
        "multiply_adds_not_counted": [*federation.not_counted],
        "uploads": sum(len(r["clients"]) for r in trained),
        "upload_bytes": sum(r["bytes_up"] for r in trained) / max(sum(len(r["clients"]) for r in trained), 1),
        "paper_bytes_up": method.paper_bytes(federation.model()),
        "peak_memory_mb": peak_memory_mb(),
        "left_out": [one for r in rows for one in r["left_out"]],
        "kernels": dict(sum((Counter(r["kernels"]) for r in rows), Counter())),
        "dense_because": next((r["dense_because"] for r in rows if r["dense_because"]), None),
        "steps": steps,
        "ms_per_step": sum((r["ms_per_step"] or 0) * r["steps"] for r in rows) / steps if steps else None,
    }


def read_summary(out: Path) -> dict[str, Any] | None:
    """Return ``summary.json``, None where there is none. Raises InputError."""
    return read_json(out / SUMMARY, LEAVE_OUT)
