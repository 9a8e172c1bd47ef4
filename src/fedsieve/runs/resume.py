"""Going on with a run: its checkpoints, whether a directory holds the run that somebody wants, and what has changed.

checkpoints/000012.safetensors    the server's state and the clients' memories after a round: state/..., memory/CLIENT,
                                  norms, lengths; in its header what it belongs to, how often the run has gone back and
                                  what it leaves out for that, what each client has of the broadcasts, and a sha256

The run is the same if its settings are, but for ``rounds``, which may change where nothing is stretched over them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedsieve.data.storage import regular, sync, write
from fedsieve.engine import Federation, Round, Run
from fedsieve.engine.federation import digest_of
from fedsieve.engine.prolong import reason_not_to_prolong
from fedsieve.engine.rollback import DEPTH, Checkpoint, Exclusion, Rollbacks
from fedsieve.runs.provenance import contents_of, hashed, sources
from fedsieve.runs.record import CHECKPOINTS, MANIFEST, OTHER, PUT_BACK, SOURCE, flatten_settings, read_manifest
from fedsieve.types import InputError, clone_shared, flatten


def save_checkpoint(out: Path, round: Round, about: Mapping[str, str]) -> None:
    """Save what a round left, and ``about`` the run; keep the last ones, as many as a run may go back to.

    One that is finite, but poisoned, is never the only one.
    """
    tensors = clone_shared({f"state/{name}": v for name, v in flatten(round.state).items()})
    for client, content in round.memory.items():
        tensors[f"memory/{client}"] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    if round.norms:
        tensors["norms"] = torch.tensor(round.norms, dtype=torch.float64)
    if round.lengths:
        rows = [(float(client), *norms) for client, norms in round.lengths.items()]
        tensors["lengths"] = torch.tensor(rows, dtype=torch.float64)
    header = {**about, "round": str(round.t), "rollbacks": json.dumps(asdict(round.rollbacks))}
    if any(any(digests) for digests in round.has.values()):
        header["has"] = json.dumps({client: [one.hex() for one in digests] for client, digests in round.has.items()})
    header["sha256"] = _digest(header, tensors)
    write(out / CHECKPOINTS / f"{round.t:06d}.safetensors", save(tensors, header))
    for old in _paths(out)[:-DEPTH]:
        old.unlink()


def remove_after(out: Path, after: int) -> None:
    """Remove the checkpoints of rounds that a run has gone back over, the newest first: a crash leaves no gap."""
    for path in reversed(_paths(out)):
        if int(path.stem) > after:
            path.unlink()
            sync(path.parent)


def load_newest(out: Path) -> tuple[Checkpoint, dict[str, str]] | None:
    """Return the newest checkpoint and what it says about its run, None where there is none.

    Raises InputError, naming the file and what to do, if it is damaged; so does what reads the ``earlier`` ones.
    """
    paths = _paths(out)
    if not paths:
        return None
    start, about = _load(paths[-1], paths[-2] if len(paths) > 1 else None)
    return replace(start, earlier=tuple(partial(_start, path) for path in paths[:-1])), about


def _start(path: Path) -> Checkpoint:
    return _load(path, None)[0]


def _load(path: Path, before: Path | None) -> tuple[Checkpoint, dict[str, str]]:
    """Return a checkpoint; ``before`` is the one that a run goes on from without it."""
    try:
        with safe_open(regular(path), "pt") as file:
            about: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        damaged = about.pop("sha256", "") != _digest(about, tensors) or int(about["round"]) != int(path.stem)
        memory = {int(n.removeprefix("memory/")): v for n, v in tensors.items() if n.startswith("memory/")}
        values = json.loads(about.pop("rollbacks"))
        digests = json.loads(about.pop("has", "{}"))
        has = {int(client): (bytes.fromhex(w), bytes.fromhex(m)) for client, (w, m) in digests.items()}
        rollbacks = Rollbacks(values["count"], tuple(Exclusion(**one) for one in values["left_out"]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        damaged = True
    if damaged:
        where = f"round {int(before.stem)}" if before else "the beginning"
        raise InputError(f"the checkpoint {path} is damaged: remove it to go on from {where}")
    state = {name.removeprefix("state/"): v for name, v in tensors.items() if name.startswith("state/")}
    contents = {client: v.numpy().tobytes() for client, v in memory.items()}
    lengths = {int(client): (a, b, c, d) for client, a, b, c, d in _rows(tensors, "lengths")}
    norms = tuple((a, b, c, d) for a, b, c, d in _rows(tensors, "norms"))
    return Checkpoint(int(about["round"]), state, contents, norms, lengths, rollbacks, has), about


def _rows(tensors: Mapping[str, Tensor], name: str) -> list[list[float]]:
    rows: list[list[float]] = tensors[name].tolist() if name in tensors else []
    return rows


def _paths(out: Path) -> list[Path]:
    """Return the checkpoints in the order of their rounds; other files there are none of ours."""
    named = [p for p in (out / CHECKPOINTS).glob("*.safetensors") if p.stem.removeprefix("-").isdecimal()]
    return sorted(named, key=lambda p: int(p.stem))


def _digest(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of a header and of tensors, whatever their order."""
    digest = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        if value.numel():
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_same_run(out: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any], resume: bool) -> None:
    """Raise InputError unless the manifest there, ``theirs``, is of the same run as ``ours``, ``rounds`` aside."""
    there, here = flatten_settings(theirs["run"]), flatten_settings(ours["run"])
    names = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    if names and names != ["rounds"]:
        differences = ", ".join(
            f"{name} {_short(there.get(name))} there, {_short(here.get(name))} here" for name in names
        )
        raise InputError(f"{out} holds another run ({differences}): {OTHER}{_drawn_anew(names, there, here)}")
    measures = [",".join(manifest["measure"]) or "none" for manifest in (theirs, ours)]
    if measures[0] != measures[1]:
        where = f"--measure {measures[0]} there, {measures[1]} here"
        raise InputError(f"{out} is measured otherwise ({where}): {OTHER}")
    for name in ("kernels", "precision"):
        before, now = (manifest.get(name, "fp32") for manifest in (theirs, ours))  # older ones say no precision
        if before != now:
            raise InputError(f"{out} was begun with --{name} {before}, not {now}: go on so, or {OTHER}")
    if not resume and names:
        rounds = f"rounds {there['rounds']} there, {here['rounds']} here"
        raise InputError(f"{out} already holds this run ({rounds}): add --resume to prolong it, or {OTHER}")
    if not resume:
        raise InputError(f"{out} already holds this run: add --resume to go on with it, or {OTHER}")


def _short(value: object) -> str:
    """Return a setting with eight digits of a hash in it."""
    return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{52,56}\b", r"\1", str(value))


def _drawn_anew(names: list[str], there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return what to do where runs differ in hashes alone, as recipes do that draw their weights or examples unseeded.

    A hash is the last word of such a setting.
    """
    words = [[str(run.get(name)).rpartition(" ")[0] for name in names] for run in (there, here)]
    if words[0] != words[1] or not all(words[0]):
        return ""
    return f"; where the recipe draws {' and '.join(names)} by chance, give a function, or seed what it draws"


def check_checkpoint(out: Path, header: Mapping[str, str], about: Mapping[str, str]) -> None:
    """Raise InputError unless the newest checkpoint is of the run that ``run.json`` says, on the same data."""
    if header.get("data") != about["data"]:
        raise InputError(f"{out} holds a run on other data: {OTHER}")
    if any(header.get(name) != value for name, value in about.items()):
        raise InputError(f"{out / MANIFEST} has been changed since the last checkpoint: {PUT_BACK}")


def check_rounds(out: Path, federation: Federation, planned: int, last: int) -> None:
    """Raise InputError unless a run that was planned for so many rounds, and is at ``last``, can have its own."""
    rounds = federation.run.rounds
    if rounds == planned:
        return
    if rounds < last:
        raise InputError(f"{out} has run {last} rounds, more than rounds={rounds}: give {last} or more, or {OTHER}")
    if why := reason_not_to_prolong(federation.run):
        raise InputError(f"{out} was planned for {planned} rounds, and rounds={rounds} would be another run: {why}")


def planned_rounds(about: Mapping[str, Any], t: int) -> int:
    """Return the rounds that the run was planned for when it ran round ``t``."""
    rounds = int(about["run"]["rounds"])
    for change in reversed(about["changes"]):
        if change["round"] > t and "rounds" in change:
            rounds = int(change["rounds"][0])
    return rounds


def check_same_code(
    out: Path, manifest: Mapping[str, Any], ours: Mapping[str, str], files: Mapping[str, Path], first: int
) -> None:
    """Raise InputError, naming the file, if the user's own code is not that of the run in ``out``."""
    theirs = manifest["source"]
    if names := [name for name in sorted(theirs.keys() | ours.keys()) if theirs.get(name) != ours.get(name)]:
        paths = ", ".join(str(files.get(name, name)) for name in names)
        raise InputError(
            f"{paths} changed since {out} was run with it (kept in {code_folder(out, manifest, first)}): put it back "
            f"as it was, go on with the change by --resume --accept-changes, or {OTHER}"
        )


def check_recorded_code(out: Path, run: Run, recipe: str) -> None:
    """Raise InputError, naming the file, if a directory holds a run by other code of the user's own than is there."""
    if manifest := read_manifest(out):
        files = sources(run, recipe)
        check_same_code(out, manifest, hashed(contents_of(files)), files, run.first)


def continued_manifest(theirs: Mapping[str, Any], ours: Mapping[str, Any], t: int) -> dict[str, Any]:
    """Return the content for a run that goes on with round ``t``: what is so now, and what that changes.

    A version that runs no further round has changed nothing.
    """
    rounds = [manifest["run"]["rounds"] for manifest in (theirs, ours)]
    names = ("version", "commit", "source") if t <= rounds[1] else ("source",)
    now = {name: ours[name] for name in names}
    change = {name: [theirs.get(name), value] for name, value in now.items() if theirs.get(name) != value}
    if rounds[0] != rounds[1]:
        change["rounds"] = rounds
    changes = [*theirs["changes"], {"round": t, **change}] if change else theirs["changes"]
    return {**theirs, **now, "run": ours["run"], "changes": changes}


def code_folder(out: Path, about: Mapping[str, Any], first: int) -> Path:
    """Return the folder of the user's own code, named by the round from which on it runs; ``first`` is the run's."""
    since = max((change["round"] for change in about["changes"] if "source" in change), default=first)
    return out / SOURCE / f"{since:06d}"


def fingerprints(federation: Federation, about: Mapping[str, Any]) -> dict[str, str]:
    """Return hashes of what a run computes: its settings, ``rounds`` aside, and who holds which examples."""
    run = {name: part for name, part in about["run"].items() if name != "rounds"}
    precision = [value for value in (about.get("precision", "fp32"),) if value != "fp32"]
    text = json.dumps([run, about["measure"], about["kernels"], *precision], sort_keys=True)
    return {"run": hashlib.sha256(text.encode()).hexdigest(), "data": digest_of(federation.shards)}
