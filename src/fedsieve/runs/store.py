"""The run directory: what was run, a row a round, checkpoints, and the model; and going on after a crash.

    run.json          the resolved run, version, commit, hardware (``run_json``)
    inputs.json       what the model takes and tells apart: an example's shape, mean and std, the classes
    partition.json    how many examples of each class every client holds
    source/           the user's own code (``source``), by the round from which on it was used
    rounds.jsonl      a row a round
    masks/            with --measure masks: every 20 rounds the positions of each layer's top weights
    checkpoints/      the server's state and the clients' memories after each of the last rounds (``checkpoints``)
    summary.json      the finished run in numbers
    model.safetensors the deployed model

Every file is written beside its place, synced, and renamed, so that a crash leaves the old one or the new one; rows
are appended and synced before their round's checkpoint, which has their hash. Nothing is ever unpickled.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save

from fedsieve.data import Dataset
from fedsieve.data.partition import counts
from fedsieve.data.storage import append, is_leftover, object_of, read_file, remove_leftovers, write, write_json
from fedsieve.engine import Engine, Federation, Round, Run
from fedsieve.engine.loop import Start, rounds
from fedsieve.engine.probe import of_both
from fedsieve.runs import checkpoints, run_json
from fedsieve.runs.checkpoints import KEPT
from fedsieve.runs.execution import Execution
from fedsieve.runs.run_json import OTHER
from fedsieve.runs.source import contents_of, hashed, sources
from fedsieve.runs.summary import summary
from fedsieve.sparse.masks import pack_bits
from fedsieve.types import InputError, clone_shared, rng, unflatten

ROWS = "rounds.jsonl"
PUT_BACK = f"put it back as it was, or {OTHER}"


@dataclass(frozen=True)
class _Found:
    """What a directory is to hold: ``run.json``, the user's own code, the rows so far, and where to go on."""

    about: dict[str, Any]
    source: dict[str, bytes]
    lines: list[bytes]
    start: Start | None


def record_run(
    out: Path, federation: Federation, engine: Engine, recipe: str, execution: Execution | None = None
) -> Iterator[Round]:
    """Run ``federation`` in the directory ``out``, yielding every round after it is safely on disk.

    ``recipe`` is the run's name; of ``execution``, ``engine``, ``device`` and ``kernels`` are noted as the caller's.
    With ``resume``, go on after the last checkpoint, to the run's ``rounds``, which may have changed where nothing is
    stretched over them; with ``accept_changes`` also if the user's own code has changed. ``until`` stops after that
    round, to be resumed later. Raises InputError, at once and before anything is written, if ``out`` holds another run,
    or any run and ``resume`` is not set, if what it holds is damaged, or if another process is at work there.
    """
    execution, lock = execution or Execution(), alone(out)
    try:
        found = _examined(out, federation, recipe, execution)
        _prepare(out, federation, found)
    except BaseException:
        os.close(lock)
        raise
    return _keep(
        out, federation, rounds(federation, engine, execution.device, found.start, execution.until), found, lock
    )


def check(out: Path, federation: Federation, recipe: str, execution: Execution) -> None:
    """Raise InputError if ``record_run`` would at once; writes nothing but the directory itself."""
    lock = alone(out)
    try:
        _examined(out, federation, recipe, execution)
    finally:
        os.close(lock)


def _examined(out: Path, federation: Federation, recipe: str, execution: Execution) -> _Found:
    """Return what is in a directory, having checked that the run can go on with it; write nothing."""
    files, run = sources(federation.run, recipe), federation.run
    source = contents_of(files)
    wanted, found = run_json.new(federation, recipe, execution, hashed(source)), run_json.read(out)
    if found is None:
        if any(not is_leftover(path) for path in out.iterdir()):
            raise InputError(f"{out} is not empty and holds no run: {OTHER}")
        return _Found(wanted, source, [], None)
    run_json.check_same(out, found, wanted, execution.resume)
    start, about = checkpoints.newest(out) or (None, {})
    last = start.t if start else run.first - 1
    planned = run_json.planned(found, last)
    if start:
        _check_checkpoint(out, about, run_json.fingerprints(federation, found) | {"rounds": str(planned)})
    lines = _lines(out, last - run.first + 1, about.get("rows"))
    run_json.check_rounds(out, federation, planned, last)
    if not execution.accept_changes:
        run_json.check_source(out, found, wanted["source"], files, run.first)
    return _Found(run_json.changed(found, wanted, last + 1), source, lines, start)


def _check_checkpoint(out: Path, found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Raise InputError unless the newest checkpoint is of the run that ``run.json`` says, on the same data."""
    if found.get("data") != wanted["data"]:
        raise InputError(f"{out} holds a run on other data: {OTHER}")
    if any(found.get(name) != value for name, value in wanted.items()):
        raise InputError(f"{out / run_json.FILE} has been changed since the last checkpoint: {PUT_BACK}")


def _lines(out: Path, count: int, digest: str | None) -> list[bytes]:
    """Return the first ``count`` lines of the rows, which have this hash; crashes may have left some few more."""
    path = out / ROWS
    *lines, _ = (read_file(path, PUT_BACK) or b"").split(b"\n")
    if digest and _hash(lines[:count]).hexdigest() != digest:
        raise InputError(f"{path} is not as it was at the last checkpoint (rows are missing or changed): {PUT_BACK}")
    if len(lines) >= count + KEPT:
        raise InputError(f"{path} has {len(lines)} rows, but the checkpoints know of {count}: {PUT_BACK}")
    return lines[:count]


def _prepare(out: Path, federation: Federation, found: _Found) -> None:
    """Write what stands in a directory before the next round."""
    (out / "checkpoints").mkdir(exist_ok=True)
    for folder in (out, out / "checkpoints", out / "masks"):
        remove_leftovers(folder)
    write_json(out / run_json.FILE, found.about)
    place = run_json.source_place(out, found.about, federation.run.first)
    for name, content in found.source.items():
        place.mkdir(parents=True, exist_ok=True)
        write(place / name, content)
    write_json(out / "inputs.json", inputs_of(federation.dataset))
    held = counts(list(federation.shards), federation.dataset.train.y, len(federation.dataset.classes))
    write_json(out / "partition.json", {"classes": list(federation.dataset.classes), "counts": held.tolist()})
    write(out / ROWS, b"".join(line + b"\n" for line in found.lines))


def check_source(out: Path, run: Run, recipe: str) -> None:
    """Raise InputError, naming the file, if a directory holds a run by other code of the user's own than is there."""
    if found := run_json.read(out):
        files = sources(run, recipe)
        run_json.check_source(out, found, hashed(contents_of(files)), files, run.first)


def _keep(out: Path, federation: Federation, stream: Generator[Round], found: _Found, lock: int) -> Iterator[Round]:
    about = run_json.fingerprints(federation, found.about) | {"rounds": str(federation.run.rounds)}
    lines, digest = found.lines, _hash(found.lines)
    try:
        with closing(stream):
            for round in stream:
                for old in ("summary.json", "model.safetensors"):  # of an earlier stop: true no more
                    (out / old).unlink(missing_ok=True)
                _keep_positions(out, round)
                line, before = json.dumps(row(round)).encode(), round.t - federation.run.first
                if before < len(lines):  # gone back: a crash in between leaves what was before, or a beginning of it
                    lines = lines[:before]
                    digest = _hash(lines)
                    checkpoints.forget(out, round.t - 1)
                    write(out / ROWS, b"".join(one + b"\n" for one in [*lines, line]))
                else:
                    append(out / ROWS, line + b"\n")
                lines.append(line)
                digest.update(line + b"\n")
                checkpoints.save(out, round, about | {"rows": digest.hexdigest()})
                yield round
        _finish(out, federation)
    finally:
        os.close(lock)


def _hash(lines: Iterable[bytes]) -> hashlib._Hash:
    return hashlib.sha256(b"".join(line + b"\n" for line in lines))


def _keep_positions(out: Path, round: Round) -> None:
    """Write where the top weights are, one bit a weight."""
    if round.positions:
        (out / "masks").mkdir(exist_ok=True)
        sizes = json.dumps({name: own.numel() for name, own in round.positions.items()})
        write(out / "masks" / f"{round.t:06d}.safetensors", save(pack_bits(round.positions), {"numel": sizes}))


def row(round: Round) -> dict[str, Any]:
    """Return a round as the row that ``rounds.jsonl`` holds."""
    numbers = {f.name: getattr(round, f.name) for f in fields(round)}
    for name in ("t", "state", "model", "memory", "norms", "lengths", "returns", "metrics", "measures", "positions"):
        del numbers[name]
    lines = {name: [asdict(line) for line in getattr(round, name)] for name in ("refused", "warnings", "left_out")}
    known = {"round": round.t, **numbers, "clients": list(round.clients), **lines}
    if taken := sorted(known.keys() & round.metrics.keys()):
        raise InputError(f"a client's metric has the name of a column of rounds.jsonl ({', '.join(taken)}): rename it")
    return known | dict(round.metrics) | dict(round.measures)


def inputs_of(dataset: Dataset) -> dict[str, Any]:
    """Return what a model of a dataset takes and tells apart, as plain JSON."""
    train = dataset.train
    return {"classes": dataset.classes, "shape": train.x.shape[1:], "mean": train.mean, "std": train.std}


def read_rows(out: Path) -> list[dict[str, Any]]:
    """Return the rows of ``rounds.jsonl``, each with its round; a last line that a crash tore off is left out.

    Raises InputError.
    """
    path = out / ROWS
    *lines, _ = (read_file(path, PUT_BACK) or b"").split(b"\n")
    rows = [object_of(line, f"{path} line {number}", PUT_BACK) for number, line in enumerate(lines, start=1)]
    for number, row in enumerate(rows, start=1):
        if type(row.get("round")) is not int:
            raise InputError(f"{path} line {number} names no round: {PUT_BACK}")
    return rows


def alone(out: Path) -> int:
    """Make the directory and lock it for this process; raise InputError if another one is at work in it."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file, which holds no run: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise InputError(f"another process is at work in {out}: wait for it, or choose another --out") from None
    return lock


def _finish(out: Path, federation: Federation) -> None:
    """Write the deployed model and the summary from what is on disk, so that a crash just before changes nothing."""
    found = checkpoints.newest(out)
    assert found is not None
    start, _ = found
    run, plain = federation.run, federation.model()
    state = unflatten(run.method.init(plain, rng(run.seed, "init")), start.tensors)
    shipped = plain.state_dict() | run.method.deploy(state)
    write(out / "model.safetensors", save(clone_shared(shipped)))
    both = {"kernels_measured": of_both(federation, state, start)} if "kernels" in federation.measure else {}
    write_json(out / "summary.json", summary(read_rows(out), federation) | both)
