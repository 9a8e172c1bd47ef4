"""Run a federation in a run directory, round by round, and go on after a crash: never with the files of another run."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save

from fedsieve.data.storage import append, is_leftover, remove_leftovers, write, write_json
from fedsieve.engine import Engine, Federation, Round
from fedsieve.engine.loop import rounds
from fedsieve.engine.measures import measure_kernels
from fedsieve.engine.rollback import Checkpoint
from fedsieve.runs import checkpoints, resume
from fedsieve.runs.execution import Execution
from fedsieve.runs.schema import (
    CHECKPOINTS,
    INPUTS,
    MANIFEST,
    MASKS,
    MODEL,
    OTHER,
    PARTITION,
    PUT_BACK,
    ROWS,
    SUMMARY,
    inputs_of,
    manifest_of,
    partition_of,
    read_lines,
    read_manifest,
    read_rows,
    row_of,
    summary_of,
)
from fedsieve.runs.source import contents_of, hashed, sources
from fedsieve.sparse.masks import pack_bits
from fedsieve.types import InputError, clone_shared, rng, unflatten


@dataclass(frozen=True)
class _Plan:
    """What a directory is to hold before the next round: ``run.json``, own code, rows so far; and where to go on."""

    manifest: dict[str, Any]
    source: dict[str, bytes]
    lines: list[bytes]
    start: Checkpoint | None


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
    execution, lock = execution or Execution(), _lock(out)
    try:
        plan = _examine(out, federation, recipe, execution)
        _prepare(out, federation, plan)
    except BaseException:
        os.close(lock)
        raise
    stream = rounds(federation, engine, execution.device, plan.start, execution.until)
    return _record(out, federation, stream, plan, lock)


def check_directory(out: Path, federation: Federation, recipe: str, execution: Execution) -> None:
    """Raise InputError if ``record_run`` would at once; writes nothing but the directory itself."""
    with locked_directory(out):
        _examine(out, federation, recipe, execution)


@contextmanager
def locked_directory(out: Path) -> Iterator[None]:
    """Make a directory and keep other processes out of it; raise InputError if another one is at work in it."""
    lock = _lock(out)
    try:
        yield
    finally:
        os.close(lock)


def _lock(out: Path) -> int:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file, which holds no run: {OTHER}")
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise InputError(f"another process is at work in {out}: wait for it, or {OTHER}") from None
    return lock


def _examine(out: Path, federation: Federation, recipe: str, execution: Execution) -> _Plan:
    """Return what a directory is to hold, having checked that the run can go on with what it holds; write nothing."""
    files, run = sources(federation.run, recipe), federation.run
    source = contents_of(files)
    wanted, manifest = manifest_of(federation, recipe, execution, hashed(source)), read_manifest(out)
    if manifest is None:
        if any(not is_leftover(path) for path in out.iterdir()):
            raise InputError(f"{out} is not empty and holds no run: {OTHER}")
        return _Plan(wanted, source, [], None)
    resume.check_same_run(out, manifest, wanted, execution.resume)
    start, about = checkpoints.load_newest(out) or (None, {})
    last = start.t if start else run.first - 1
    length = resume.planned_rounds(manifest, last)
    if start:
        resume.check_checkpoint(out, about, resume.fingerprints(federation, manifest) | {"rounds": str(length)})
    lines = _lines(out, last - run.first + 1, about.get("rows"))
    resume.check_rounds(out, federation, length, last)
    if not execution.accept_changes:
        resume.check_same_code(out, manifest, wanted["source"], files, run.first)
    return _Plan(resume.continued_manifest(manifest, wanted, last + 1), source, lines, start)


def _lines(out: Path, count: int, digest: str | None) -> list[bytes]:
    """Return the first ``count`` lines of the rows, which have this hash; crashes may have left some few more."""
    lines = read_lines(out)
    if digest and _hash(lines[:count]).hexdigest() != digest:
        raise InputError(
            f"{out / ROWS} is not as it was at the last checkpoint (rows are missing or changed): {PUT_BACK}"
        )
    if len(lines) >= count + checkpoints.COUNT:
        raise InputError(f"{out / ROWS} has {len(lines)} rows, but the checkpoints know of {count}: {PUT_BACK}")
    return lines[:count]


def _prepare(out: Path, federation: Federation, plan: _Plan) -> None:
    """Write what stands in a directory before the next round."""
    (out / CHECKPOINTS).mkdir(exist_ok=True)
    for folder in (out, out / CHECKPOINTS, out / MASKS):
        remove_leftovers(folder)
    write_json(out / MANIFEST, plan.manifest)
    code = resume.code_folder(out, plan.manifest, federation.run.first)
    for name, content in plan.source.items():
        code.mkdir(parents=True, exist_ok=True)
        write(code / name, content)
    write_json(out / INPUTS, inputs_of(federation.dataset))
    write_json(out / PARTITION, partition_of(federation))
    write(out / ROWS, b"".join(line + b"\n" for line in plan.lines))


def _record(out: Path, federation: Federation, stream: Generator[Round], plan: _Plan, lock: int) -> Iterator[Round]:
    about = resume.fingerprints(federation, plan.manifest) | {"rounds": str(federation.run.rounds)}
    lines, digest = plan.lines, _hash(plan.lines)
    try:
        with closing(stream):
            for round in stream:
                for old in (SUMMARY, MODEL):  # of an earlier stop: true no more
                    (out / old).unlink(missing_ok=True)
                _write_positions(out, round)
                line, before = json.dumps(row_of(round)).encode(), round.t - federation.run.first
                if before < len(lines):  # gone back: a crash in between leaves what was before, or a beginning of it
                    lines = lines[:before]
                    digest = _hash(lines)
                    checkpoints.remove_after(out, round.t - 1)
                    write(out / ROWS, b"".join(one + b"\n" for one in [*lines, line]))
                else:
                    append(out / ROWS, line + b"\n")
                lines.append(line)
                digest.update(line + b"\n")
                checkpoints.save_checkpoint(out, round, about | {"rows": digest.hexdigest()})
                yield round
        _finish(out, federation)
    finally:
        os.close(lock)


def _hash(lines: Iterable[bytes]) -> hashlib._Hash:
    return hashlib.sha256(b"".join(line + b"\n" for line in lines))


def _write_positions(out: Path, round: Round) -> None:
    """Write where the top weights are, one bit a weight, in the rounds that measure it."""
    if round.positions:
        (out / MASKS).mkdir(exist_ok=True)
        sizes = json.dumps({name: own.numel() for name, own in round.positions.items()})
        write(out / MASKS / f"{round.t:06d}.safetensors", save(pack_bits(round.positions), {"numel": sizes}))


def _finish(out: Path, federation: Federation) -> None:
    """Write the deployed model and the summary from what is on disk, so that a crash just before changes nothing."""
    newest = checkpoints.load_newest(out)
    assert newest is not None
    start, _ = newest
    run, plain = federation.run, federation.model()
    state = unflatten(run.method.init(plain, rng(run.seed, "init")), start.tensors)
    write(out / MODEL, save(clone_shared(plain.state_dict() | run.method.deploy(state))))
    both = {"kernels_measured": measure_kernels(federation, state, start)} if "kernels" in federation.measure else {}
    write_json(out / SUMMARY, summary_of(read_rows(out), federation) | both)
