"""``run.json``: what a run directory holds, and whether it is the run that somebody wants to go on with.

    recipe, engine, device, kernels, measure     how it was started
    version, commit, hardware, ...               by what, and where
    method, class, target_density                what the method says of itself beside its settings
    run                                          every setting
    source                                       the sha256 of every file of the user's own code
    changes                                      what changed while it ran: from which round on, before and after

The run is the same if its settings are, but for ``rounds``, which may change where nothing is stretched over them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsieve.data.storage import read_json
from fedsieve.engine import Federation
from fedsieve.engine.fingerprint import described, digest_of
from fedsieve.engine.schedule import stretched
from fedsieve.runs.environment import circumstances
from fedsieve.runs.execution import Execution
from fedsieve.types import InputError

FILE = "run.json"
OTHER = "choose another --out"


def new(federation: Federation, recipe: str, execution: Execution, source: Mapping[str, str]) -> dict[str, Any]:
    """Return the content of a new run's file."""
    start = {"recipe": recipe, "engine": execution.engine, "device": execution.device, "kernels": execution.kernels}
    run, method = federation.run, federation.run.method
    about = {"method": method.name, "class": described(type(method)), "target_density": run.target_density}
    about |= {"measure": list(federation.measure), "run": described(run)}
    json.dumps(about, default=_unwritable)
    return start | circumstances() | about | {"source": dict(source), "changes": []}


def _unwritable(value: object) -> None:
    raise InputError(
        f"a field of the run or its method holds {type(value).__name__}, which {FILE} cannot: give numbers, texts, "
        "lists, functions or dataclasses of them"
    )


def read(out: Path) -> dict[str, Any] | None:
    """Return the content of a directory's file, None where there is none. Raises InputError if it is none of ours."""
    about = read_json(out / FILE, f"put it back as it was, or {OTHER}")
    if about is None:
        return None
    about = {"kernels": "dense", "measure": [], "source": {}, "changes": [], **about}  # older runs lack some
    run = about.get("run")
    plain = isinstance(run, dict) and type(run.get("rounds")) is int and isinstance(about["source"], dict)
    if not (plain and _texts(about["measure"]) and isinstance(about["kernels"], str) and _changes(about["changes"])):
        raise InputError(f"{out / FILE} does not say what was run: put it back as it was, or {OTHER}")
    return about


def kernels_of(out: Path) -> str | None:
    """Return the kernels that a directory's run was begun with; None if it holds none. Raises InputError."""
    about = read(out)
    return None if about is None else str(about["kernels"])


def check_same(out: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], resume: bool) -> None:
    """Raise InputError unless the run ``found`` there is the one ``wanted``, ``rounds`` aside."""
    theirs, ours = _leaves(found["run"]), _leaves(wanted["run"])
    changed = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    if changed and changed != ["rounds"]:
        listed = ", ".join(f"{name} {theirs.get(name)} there, {ours.get(name)} here" for name in changed)
        raise InputError(f"{out} holds another run ({listed}): {OTHER}")
    measured, asked = (",".join(about["measure"]) or "none" for about in (found, wanted))
    if measured != asked:
        raise InputError(f"{out} is measured otherwise (--measure {measured} there, {asked} here): {OTHER}")
    if found["kernels"] != wanted["kernels"]:
        begun = f"--kernels {found['kernels']}, not {wanted['kernels']}"
        raise InputError(f"{out} was begun with {begun}: go on so, or {OTHER}")
    if not resume and changed:
        planned = f"rounds {theirs['rounds']} there, {ours['rounds']} here"
        raise InputError(f"{out} already holds this run ({planned}): add --resume to prolong it, or {OTHER}")
    if not resume:
        raise InputError(f"{out} already holds this run: add --resume to go on with it, or {OTHER}")


def check_rounds(out: Path, federation: Federation, planned: int, last: int) -> None:
    """Raise InputError unless a run that was planned for so many rounds, and is at ``last``, can have the wanted."""
    rounds = federation.run.rounds
    if rounds == planned:
        return
    if rounds < last:
        raise InputError(f"{out} has run {last} rounds, more than rounds={rounds}: give {last} or more, or {OTHER}")
    if why := stretched(federation.run):
        raise InputError(f"{out} was planned for {planned} rounds, and rounds={rounds} would be another run: {why}")


def planned(about: Mapping[str, Any], t: int) -> int:
    """Return the rounds that the run was planned for when it ran round ``t``."""
    rounds = int(about["run"]["rounds"])
    for change in reversed(about["changes"]):
        if change["round"] > t and "rounds" in change:
            rounds = int(change["rounds"][0])
    return rounds


def check_source(
    out: Path, found: Mapping[str, Any], ours: Mapping[str, str], files: Mapping[str, Path], first: int
) -> None:
    """Raise InputError, naming the file, if the user's own code is not that of the run ``found`` in ``out``."""
    theirs = found["source"]
    if changed := [name for name in sorted(theirs.keys() | ours.keys()) if theirs.get(name) != ours.get(name)]:
        names = ", ".join(str(files.get(name, name)) for name in changed)
        raise InputError(
            f"{names} changed since {out} was run with it (kept in {source_place(out, found, first)}): put it back as "
            f"it was, go on with the change by --resume --accept-changes, or {OTHER}"
        )


def changed(found: Mapping[str, Any], wanted: Mapping[str, Any], t: int) -> dict[str, Any]:
    """Return the content for a run that goes on with round ``t``: what is wanted now, and what that changes.

    A version that runs no further round has changed nothing.
    """
    rounds = [about["run"]["rounds"] for about in (found, wanted)]
    names = ("version", "commit", "source") if t <= rounds[1] else ("source",)
    now = {name: wanted[name] for name in names}
    change = {name: [found.get(name), value] for name, value in now.items() if found.get(name) != value}
    if rounds[0] != rounds[1]:
        change["rounds"] = rounds
    changes = [*found["changes"], {"round": t, **change}] if change else found["changes"]
    return {**found, **now, "run": wanted["run"], "changes": changes}


def source_place(out: Path, about: Mapping[str, Any], first: int) -> Path:
    """Return the folder of the user's own code, named by the round from which on it runs; ``first`` is the run's."""
    since = max((change["round"] for change in about["changes"] if "source" in change), default=first)
    return out / "source" / f"{since:06d}"


def fingerprints(federation: Federation, about: Mapping[str, Any]) -> dict[str, str]:
    """Return hashes of what a run computes: its settings, ``rounds`` aside, and who holds which examples."""
    run = {name: part for name, part in about["run"].items() if name != "rounds"}
    text = json.dumps([run, about["measure"], about["kernels"]], sort_keys=True)
    return {"run": hashlib.sha256(text.encode()).hexdigest(), "data": digest_of(federation.shards)}


def _leaves(node: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping):
        return {path: node}
    found: dict[str, Any] = {}
    for name, value in node.items():
        found |= _leaves(value, f"{path}.{name}" if path else str(name))
    return found


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _changes(value: Any) -> bool:
    """Say whether a value is a list of changes, each from a round on, with rounds before and after."""
    return isinstance(value, list) and all(
        isinstance(one, dict)
        and type(one.get("round")) is int
        and ("rounds" not in one or (isinstance(one["rounds"], list) and [type(n) for n in one["rounds"]] == [int] * 2))
        for one in value
    )
