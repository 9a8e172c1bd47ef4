"""The run directory: what was run, a row a round, checkpoints, and the model; and going on after a crash.

    run.json          the resolved run, version, commit, hardware
    inputs.json       what the model takes and tells apart: an example's shape, mean and std, the classes
    partition.json    how many examples of each class every client holds
    rounds.jsonl      a row a round
    masks/            with --measure masks: every 20 rounds the positions of each layer's top weights
    checkpoints/      the server's state and the clients' memories after each of the last two rounds
    summary.json      the finished run in numbers
    model.safetensors the deployed model

Every file is written beside its place, synced, and renamed, so that a crash leaves the old one or the new one; rows
are appended and synced before their round's checkpoint. Nothing is ever unpickled.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedsieve.circumstances import circumstances
from fedsieve.data import Dataset
from fedsieve.data.partition import counts
from fedsieve.engine import Engine, Federation, Round
from fedsieve.engine.fingerprint import described, fingerprint
from fedsieve.engine.loop import Start, rounds
from fedsieve.engine.probe import of_both
from fedsieve.expected import Norms
from fedsieve.masks import packed
from fedsieve.summary import summary
from fedsieve.types import InputError, flatten, rng, unflatten

ROWS, KEPT = "rounds.jsonl", 2


@dataclass(frozen=True)
class Origin:
    """How a run was started: the recipe's name, the engine's, the device, and the kernels that were chosen."""

    recipe: str
    engine: str = "local"
    device: str = "cpu"
    kernels: str = "auto"


def keep(
    out: Path, federation: Federation, engine: Engine, origin: Origin, *, resume: bool = False, until: int = 0
) -> Iterator[Round]:
    """Run ``federation`` in the directory ``out``, yielding every round after it is safely on disk.

    With ``resume``, go on after the last checkpoint; ``until`` stops after that round, to be resumed later. Raises
    InputError, at once and before anything is written, if ``out`` holds another run, or any run and ``resume`` is not
    set, or if another process is at work there.
    """
    lock = alone(out)
    try:
        start = _open(out, federation, origin, resume)
    except BaseException:
        os.close(lock)
        raise
    return _keep(out, federation, rounds(federation, engine, origin.device, start, until), lock)


def check(out: Path, federation: Federation, origin: Origin, resume: bool) -> None:
    """Raise InputError if ``keep`` would at once; writes nothing but the directory itself."""
    lock = alone(out)
    try:
        if (out / "run.json").exists():
            _check_same(out, described(federation.run), federation.measure, origin.kernels, resume)
    finally:
        os.close(lock)


def _keep(out: Path, federation: Federation, stream: Generator[Round], lock: int) -> Iterator[Round]:
    mark = fingerprint(federation)
    try:
        with closing(stream):
            for round in stream:
                for old in ("summary.json", "model.safetensors"):  # of an earlier stop: true no more
                    (out / old).unlink(missing_ok=True)
                _keep_positions(out, round)
                _append(out / ROWS, json.dumps(row(round)))
                _checkpoint(out, round, mark)
                yield round
        _finish(out, federation)
    finally:
        os.close(lock)


def _keep_positions(out: Path, round: Round) -> None:
    """Write where the top weights are, one bit a weight."""
    if round.positions:
        (out / "masks").mkdir(exist_ok=True)
        sizes = json.dumps({name: own.numel() for name, own in round.positions.items()})
        write(out / "masks" / f"{round.t:06d}.safetensors", save(packed(round.positions), {"numel": sizes}))


def row(round: Round) -> dict[str, Any]:
    """Return a round as the row that ``rounds.jsonl`` holds."""
    numbers = {f.name: getattr(round, f.name) for f in fields(round)}
    for name in ("t", "state", "model", "memory", "norms", "metrics", "measures", "positions"):
        del numbers[name]
    refused = [asdict(refusal) for refusal in round.refused]
    known = {"round": round.t, **numbers, "clients": list(round.clients), "refused": refused}
    if taken := sorted(known.keys() & round.metrics.keys()):
        raise InputError(f"a client's metric has the name of a column of rounds.jsonl ({', '.join(taken)}): rename it")
    return known | dict(round.metrics) | dict(round.measures)


def inputs_of(dataset: Dataset) -> dict[str, Any]:
    """Return what a model of a dataset takes and tells apart, as plain JSON."""
    train = dataset.train
    return {"classes": dataset.classes, "shape": train.x.shape[1:], "mean": train.mean, "std": train.std}


def read_rows(out: Path) -> list[dict[str, Any]]:
    """Return the rows of ``rounds.jsonl``; a last line that a crash tore off is left out. Raises InputError."""
    path = out / ROWS
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise InputError(f"{path} is damaged at line {number}: choose another --out") from None
    return rows


def _open(out: Path, federation: Federation, origin: Origin, resume: bool) -> Start | None:
    """Make or check the directory, and return where to go on."""
    described_run, start = described(federation.run), None
    if (out / "run.json").exists():
        _check_same(out, described_run, federation.measure, origin.kernels, resume)
        start = _newest(out, fingerprint(federation))
        first = federation.run.first
        rows = _rows_to(out, first, start.t if start else first - 1)
        write(out / ROWS, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
    elif any(not p.name.endswith(".tmp") for p in out.iterdir()):
        raise InputError(f"{out} is not empty and holds no run: choose another --out")
    else:
        told = {"method": federation.run.method.name, "measure": list(federation.measure), "run": described_run}
        write_json(out / "run.json", asdict(origin) | circumstances() | told)
    write_json(out / "inputs.json", inputs_of(federation.dataset))
    held = counts(list(federation.shards), federation.dataset.train.y, len(federation.dataset.classes))
    write_json(out / "partition.json", {"classes": list(federation.dataset.classes), "counts": held.tolist()})
    return start


def _rows_to(out: Path, first: int, last: int) -> list[dict[str, Any]]:
    """Return the rows of rounds ``first`` to ``last``; a crash may have left one more, nothing else may be there."""
    rows = read_rows(out)
    found = [row.get("round") if isinstance(row, dict) else None for row in rows]
    whole = list(range(first, last + 1))
    if found[: len(whole)] != whole or len(found) > len(whole) + 1:
        raise InputError(f"{out} has a checkpoint of round {last} but rows of rounds {found}: choose another --out")
    return rows[: len(whole)]


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


def kernels_of(out: Path) -> str | None:
    """Return the kernels that a directory's run was begun with (older ones: dense); None if it holds none."""
    try:
        about = json.loads((out / "run.json").read_text())
    except (OSError, ValueError):
        return None
    return str(about.get("kernels", "dense")) if isinstance(about, dict) else None


def _check_same(out: Path, wanted: dict[str, Any], measure: tuple[str, ...], kernels: str, resume: bool) -> None:
    try:
        about = json.loads((out / "run.json").read_text())
        found, measured = about["run"], ",".join(about.get("measure", [])) or "none"
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{out / 'run.json'} is damaged: choose another --out") from None
    if found != wanted:
        theirs, ours = _leaves(found), _leaves(wanted)
        changed = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
        listed = ", ".join(f"{name} {theirs.get(name)} there, {ours.get(name)} here" for name in changed)
        raise InputError(f"{out} holds another run ({listed}): choose another --out")
    if measured != (asked := ",".join(measure) or "none"):
        raise InputError(
            f"{out} is measured otherwise (--measure {measured} there, {asked} here): choose another --out"
        )
    if kernels != (begun := kernels_of(out)):
        raise InputError(f"{out} was begun with --kernels {begun}, not {kernels}: go on so, or choose another --out")
    if not resume:
        raise InputError(f"{out} already holds this run: add --resume to go on with it, or choose another --out")


def _leaves(node: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping):
        return {path: node}
    found: dict[str, Any] = {}
    for name, value in node.items():
        found |= _leaves(value, f"{path}.{name}" if path else str(name))
    return found


def _checkpoint(out: Path, round: Round, run: str) -> None:
    """Save state and memories after a round, and what its bound remembers; keep the last two."""
    tensors = {f"state/{name}": v.contiguous() for name, v in flatten(round.state).items()}
    for client, kept in round.memory.items():
        tensors[f"memory/{client}"] = torch.frombuffer(bytearray(kept), dtype=torch.uint8)
    if round.norms:
        tensors["norms"] = torch.tensor(round.norms, dtype=torch.float64)
    told = {"round": str(round.t), "run": run, "sha256": _digest(tensors)}
    folder = out / "checkpoints"
    folder.mkdir(exist_ok=True)
    write(folder / f"{round.t:06d}.safetensors", save(tensors, told))
    for old in _checkpoints(out)[:-KEPT]:
        old.unlink()


def _checkpoints(out: Path) -> list[Path]:
    """Return the checkpoints in the order of their rounds; other files there are none of ours."""
    named = [p for p in (out / "checkpoints").glob("*.safetensors") if p.stem.isdecimal()]
    return sorted(named, key=lambda p: int(p.stem))


def _newest(out: Path, run: str) -> Start | None:
    """Return the newest checkpoint; raise InputError, naming the file, if it is damaged or another run's."""
    paths = _checkpoints(out)
    if not paths:
        return None
    path, before = paths[-1], f"round {int(paths[-2].stem)}" if len(paths) > 1 else "the beginning"
    try:
        with safe_open(path, "pt") as file:
            told: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        damaged = told.get("sha256") != _digest(tensors) or int(told["round"]) != int(path.stem)
    except (SafetensorError, OSError, ValueError, KeyError):
        damaged = True
    if damaged:
        raise InputError(f"the checkpoint {path} is damaged: remove it to go on from {before}")
    if told.get("run") != run:
        raise InputError(f"the checkpoint {path} belongs to a run on other data: choose another --out")
    state = {name.removeprefix("state/"): v for name, v in tensors.items() if name.startswith("state/")}
    memory = {
        int(n.removeprefix("memory/")): v.numpy().tobytes() for n, v in tensors.items() if n.startswith("memory/")
    }
    return Start(int(told["round"]), state, memory, _norms(tensors))


def _norms(tensors: Mapping[str, Tensor]) -> tuple[Norms, ...]:
    return tuple((weights, others) for weights, others in tensors["norms"].tolist()) if "norms" in tensors else ()


def _finish(out: Path, federation: Federation) -> None:
    """Write the deployed model and the summary from what is on disk, so that a crash just before changes nothing."""
    start = _newest(out, fingerprint(federation))
    assert start is not None
    run, plain = federation.run, federation.model()
    state = unflatten(run.method.init(plain, rng(run.seed, "init")), start.tensors)
    shipped = plain.state_dict() | run.method.deploy(state)
    write(out / "model.safetensors", save({name: v.contiguous() for name, v in shipped.items()}))
    both = {"kernels_measured": of_both(federation, state, start)} if "kernels" in federation.measure else {}
    write_json(out / "summary.json", summary(read_rows(out), federation) | both)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        if value.numel():
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _append(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as JSON, so that a crash leaves the old file or the new one."""
    write(path, (json.dumps(content, indent=1) + "\n").encode())


def write(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
