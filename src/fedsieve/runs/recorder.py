"""Run a federation in a run directory, round by round, and go on after a crash: never with the files of another run."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from safetensors.torch import save

from fedsieve.client.process import peak_memory_mb
from fedsieve.client.training import load_
from fedsieve.data import Dataset
from fedsieve.data.partition import holdings
from fedsieve.data.storage import append, is_leftover, locked, remove_leftovers, write, write_json
from fedsieve.engine import Engine, Federation, Round
from fedsieve.engine.federation import described
from fedsieve.engine.loop import rounds
from fedsieve.engine.measures import measure_kernels
from fedsieve.engine.rollback import DEPTH, Checkpoint
from fedsieve.recipes.papers.arithmetic import arithmetic_version
from fedsieve.runs import resume
from fedsieve.runs.callbacks import Callback, Callbacks, ObservedRun
from fedsieve.runs.execution import Execution
from fedsieve.runs.provenance import contents_of, describe_environment, hashed, sources
from fedsieve.runs.record import (
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
    read_lines,
    read_manifest,
    read_rows,
    read_summary,
)
from fedsieve.runs.stopping import StopRule, parse_stop_rule
from fedsieve.sparse.masks import pack_bits
from fedsieve.types import InputError, clone_shared, rng, unflatten

_Save: TypeAlias = Callable[[Callable[[], None] | None], None]
NOT_IN_ROWS = {
    *("t", "state", "model", "memory", "has", "norms", "lengths", "rollbacks", "positions"),
    *("scores", "metrics", "measures"),
}
"""The fields of a ``Round`` that are no columns of its row: ``t`` is ``round`` there, the last three are their own."""


@dataclass(frozen=True)
class _Plan:
    """What a directory is to hold before the next round: ``run.json``, own code, rows; where to go on, and end."""

    manifest: dict[str, Any]
    source: dict[str, bytes]
    lines: list[bytes]
    start: Checkpoint | None
    stop: StopRule


def record_run(
    out: Path,
    federation: Federation,
    engine: Engine,
    recipe: str,
    execution: Execution | None = None,
    callbacks: Sequence[Callback] = (),
) -> Generator[Round]:
    """Run ``federation`` in the directory ``out``, yielding every round after it is safely on disk.

    Every round then goes to the ``callbacks``. On a GPU, without any, a round's row is on disk when it is yielded; its
    checkpoint is written while the next round begins, and is there before that one's row: a crash loses no more than a
    round. With the last round everything is.

    ``recipe`` is the run's name; of ``execution``, ``engine``, ``device``, ``kernels`` and ``precision`` are noted as
    the caller's. With ``resume``, go on after the last checkpoint, to the run's ``rounds``, which may have changed
    where nothing is stretched over them; with ``accept_changes`` also if the user's own code has changed. ``until``
    stops after a round, or the first test that meets a condition, to be resumed later: without an ``until``, a run that
    has met its condition does nothing more. Raises InputError, at once and before anything is written, if ``out`` holds
    another run, or any run and ``resume`` is not set, if what it holds is damaged, or if another process is at work
    there.
    """
    execution = execution or Execution()
    observers = Callbacks([*execution.loggers, *callbacks], execution.on_error, out)
    with ExitStack() as stack:
        stack.enter_context(locked_directory(out))
        plan = _examine(out, federation, recipe, execution)
        _prepare(out, federation, plan)
        stack.enter_context(observers.opened(ObservedRun(out, plan.manifest, read_rows(out))))
        lock = stack.pop_all()
    how = execution.device, plan.start, plan.stop.round
    stream = rounds(federation, engine, *how, kernels=execution.kernels)
    return _record(out, federation, stream, plan, observers, lock, _saver("cpu" if callbacks else execution.device))


def check_directory(out: Path, federation: Federation, recipe: str, execution: Execution) -> None:
    """Raise InputError if ``record_run`` would at once; writes nothing but the directory itself."""
    with locked_directory(out):
        _examine(out, federation, recipe, execution)


@contextmanager
def locked_directory(out: Path) -> Iterator[None]:
    """Make a directory and keep other processes out of it; raise InputError if another one is at work in it."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file, which holds no run: {OTHER}")
    with locked(out, f"wait for it, or {OTHER}"):
        yield


def _examine(out: Path, federation: Federation, recipe: str, execution: Execution) -> _Plan:
    """Return what a directory is to hold, having checked that the run can go on with what it holds; write nothing."""
    files, run = sources(federation.run, recipe), federation.run
    code = contents_of(files)
    ours, theirs = manifest_of(federation, recipe, execution, hashed(code)), read_manifest(out)
    stop = execution.stop_rule
    stop.check(federation)
    if theirs is None:
        if any(not is_leftover(path) for path in out.iterdir()):
            raise InputError(f"{out} is not empty and holds no run: {OTHER}")
        return _Plan(ours, code, [], None, stop)
    resume.check_same_run(out, theirs, ours, execution.resume)
    start, about = resume.load_newest(out) or (None, {})
    last = start.t if start else run.first - 1
    length = resume.planned_rounds(theirs, last)
    if start:
        resume.check_checkpoint(out, about, resume.fingerprints(federation, theirs) | {"rounds": str(length)})
    lines, count = read_lines(out), last - run.first + 1
    if (digest := about.get("rows")) and digest != _hash(lines[:count]).hexdigest():
        raise InputError(
            f"{out / ROWS} is not as it was at the last checkpoint (rows are missing or changed): {PUT_BACK}"
        )
    if len(lines) >= count + DEPTH:  # crashes may have left some few more
        raise InputError(f"{out / ROWS} has {len(lines)} rows, but the checkpoints know of {count}: {PUT_BACK}")
    resume.check_rounds(out, federation, length, last)
    if not execution.accept_changes:
        resume.check_same_code(out, theirs, ours["source"], files, run.first)
    if not execution.until:
        with suppress(InputError):  # a summary that is damaged is written anew
            stop = parse_stop_rule(str((read_summary(out) or {}).get("stopped_because", "")))
    return _Plan(resume.continued_manifest(theirs, ours, last + 1), code, lines[:count], start, stop)


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
    dataset = federation.dataset
    write_json(out / INPUTS, inputs_of(dataset))
    classes, table = holdings(federation.shards, dataset)
    write_json(out / PARTITION, {"classes": list(classes), "counts": table.tolist()})
    write(out / ROWS, b"".join(line + b"\n" for line in plan.lines))


def _record(
    out: Path,
    federation: Federation,
    stream: Generator[Round],
    plan: _Plan,
    observers: Callbacks,
    lock: ExitStack,
    saver: AbstractContextManager[_Save],
) -> Generator[Round]:
    about = resume.fingerprints(federation, plan.manifest) | {"rounds": str(federation.run.rounds)}
    lines, digest = plan.lines, _hash(plan.lines)
    with lock:
        row = json.loads(lines[-1]) if lines else None
        with saver as checkpoint, closing(stream):
            while not plan.stop.reason(row, federation.metrics) and (round := next(stream, None)):
                checkpoint(None)
                for old in (SUMMARY, MODEL):  # of an earlier stop: true no more
                    (out / old).unlink(missing_ok=True)
                _write_positions(out, round)
                line, before = json.dumps(row := row_of(round)).encode(), round.t - federation.run.first
                if before < len(lines):  # gone back: a crash in between leaves what was before, or a beginning of it
                    lines = lines[:before]
                    digest = _hash(lines)
                    resume.remove_after(out, round.t - 1)
                    write(out / ROWS, b"".join(one + b"\n" for one in [*lines, line]))
                else:
                    append(out / ROWS, line + b"\n")
                lines.append(line)
                digest.update(line + b"\n")
                checkpoint(partial(resume.save_checkpoint, out, round, about | {"rows": digest.hexdigest()}))
                observers(round, row)
                yield round
            checkpoint(None)
        _finish(out, federation, plan.stop)


@contextmanager
def _saver(device: str) -> Iterator[_Save]:
    """Yield what saves a checkpoint, on a GPU by a thread, and first waits for the one before; with None, only that."""
    if device == "cpu":
        yield lambda save: save() if save else None
        return
    with ThreadPoolExecutor(1, "checkpoint") as thread:
        under_way: list[Future[None]] = []

        def save_later(save: Callable[[], None] | None) -> None:
            while under_way:
                under_way.pop().result()
            if save:
                under_way.append(thread.submit(save))

        yield save_later


def _hash(lines: Iterable[bytes]) -> hashlib._Hash:
    return hashlib.sha256(b"".join(line + b"\n" for line in lines))


def _write_positions(out: Path, round: Round) -> None:
    """Write where the top weights are, one bit a weight, in the rounds that measure it."""
    if round.positions:
        (out / MASKS).mkdir(exist_ok=True)
        sizes = json.dumps({name: own.numel() for name, own in round.positions.items()})
        write(out / MASKS / f"{round.t:06d}.safetensors", save(pack_bits(round.positions), {"numel": sizes}))


def _finish(out: Path, federation: Federation, stop: StopRule) -> None:
    """Write the deployed model and the summary from what is on disk, so that a crash just before changes nothing."""
    newest = resume.load_newest(out)
    assert newest is not None
    start, _ = newest
    run, plain = federation.run, federation.model()
    state = unflatten(run.method.init(plain, rng(run.seed, "init")), start.tensors)
    write(out / MODEL, save(clone_shared(load_(plain, run.method.deploy(state)).state_dict())))
    both = {"kernels_measured": measure_kernels(federation, state, start)} if "kernels" in federation.measure else {}
    write_json(out / SUMMARY, summary_of(read_rows(out), federation, stop) | both)


def manifest_of(federation: Federation, recipe: str, execution: Execution, source: Mapping[str, str]) -> dict[str, Any]:
    """Return ``run.json`` of a new run; ``source`` has the sha256 of every file of the user's own code."""
    run, method = federation.run, federation.run.method
    names = ("engine", "device", "kernels", "precision")
    start = {"recipe": recipe, **{name: getattr(execution, name) for name in names}}
    about = {"method": method.name, "class": described(type(method)), "target_density": run.target_density}
    about |= {
        "measure": list(federation.measure),
        "run": described(run),
        "dataset": describe_dataset(federation.dataset),
    }
    json.dumps(about, default=_unwritable)
    about |= {"arithmetic": arithmetic_version(recipe)}
    if [*federation.metrics] != ["accuracy"]:
        about |= {"metrics": {name: metric.higher_is_better for name, metric in federation.metrics.items()}}
    return start | describe_environment() | about | {"source": dict(source), "changes": []}


def describe_dataset(dataset: Dataset) -> dict[str, Any]:
    """Return which dataset, and which version of it, a run is on, with the numbers of examples and of their owners."""
    sizes = {"training": len(dataset.train), "test": len(dataset.test), "owners": len(dataset.groups)}
    return {"name": dataset.name, "version": dataset.version} | sizes


def _unwritable(value: object) -> None:
    raise InputError(
        f"a field of the run or its method holds {type(value).__name__}, which {MANIFEST} cannot: give numbers, texts, "
        "lists, functions or dataclasses of them"
    )


def row_of(round: Round) -> dict[str, Any]:
    """Return a round as the row that ``rounds.jsonl`` holds. Raises InputError for a metric named like a column."""
    row = {"round": round.t} | {f.name: getattr(round, f.name) for f in fields(round) if f.name not in NOT_IN_ROWS}
    row |= {name: [asdict(one) for one in getattr(round, name)] for name in ("refused", "warnings", "left_out")}
    row["clients"] = list(round.clients)
    if names := sorted(row.keys() & round.metrics.keys()):
        raise InputError(f"a client's metric has the name of a column of {ROWS} ({', '.join(names)}): rename it")
    return row | dict(round.scores) | dict(round.metrics) | dict(round.measures)


def inputs_of(dataset: Dataset) -> dict[str, Any]:
    """Return ``inputs.json``: what a model of a dataset takes and tells apart."""
    train = dataset.train
    return {"classes": dataset.classes, "shape": train.shape, "mean": train.mean, "std": train.std}


def summary_of(rows: list[dict[str, Any]], federation: Federation, stop: StopRule) -> dict[str, Any]:
    """Return ``summary.json``: sums over the rounds so far, the last test, and what one upload weighs in training.

    Of a run that a condition of ``stop`` has ended, it says where and which.
    """
    method, why = federation.run.method, stop.reason(rows[-1], federation.metrics)
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
        **({"stopped_at": rows[-1]["round"], "stopped_because": why} if why else {}),
        "accuracy": tested[-1] if tested else None,
        "accuracy_validation": validated[-1] if validated else None,
        **({"accuracy_pruned": pruned[-1]} if pruned else {}),
        **_last_scores(rows, federation),
        "density": rows[-1]["density"],
        "density_of_policy": rows[-1].get("density_of_policy"),
        "density_of_all": rows[-1]["density_of_all"],
        **{name: sum(r[name] for r in rows) for name in (*sums, "seconds")},
        "multiply_adds_not_counted": [*federation.not_counted],
        "uploads": sum(len(r["clients"]) for r in trained),
        "upload_bytes": sum(r["bytes_up"] for r in trained) / max(sum(len(r["clients"]) for r in trained), 1),
        "paper_bytes_up": method.paper_bytes(federation.model()),
        "csr_bytes_up": _mean_csr(trained),
        "peak_memory_mb": peak_memory_mb(),
        "left_out": [one for r in rows for one in r["left_out"]],
        "kernels": dict(sum((Counter(r["kernels"]) for r in rows), Counter())),
        "dense_because": next((r["dense_because"] for r in rows if r["dense_because"]), None),
        "steps": steps,
        "ms_per_step": sum((r["ms_per_step"] or 0) * r["steps"] for r in rows) / steps if steps else None,
    }


def _last_scores(rows: list[dict[str, Any]], federation: Federation) -> dict[str, float | None]:
    """Return the last numbers of a task's metrics other than accuracy, and of what was measured of the clients."""
    suffixes = ("", "_validation", "_pruned", "_clients", "_worst_tenth", "_spread")
    names = [f"{name}{suffix}" for name in federation.metrics for suffix in suffixes]
    columns = [n for n in names if n not in ("accuracy", "accuracy_validation", "accuracy_pruned") and n in rows[-1]]
    return {n: next((v for row in reversed(rows) if (v := row.get(n)) is not None), None) for n in columns}


def _mean_csr(rows: list[dict[str, Any]]) -> float | None:
    """Return the mean bytes of one upload as CSR; None where no row says, as in rows of an earlier version."""
    known = [(size, len(row["clients"])) for row in rows if (size := row.get("csr_bytes_up")) is not None]
    return sum(size * n for size, n in known) / sum(n for _, n in known) if known else None
