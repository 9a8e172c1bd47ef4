"""Whether a run directory holds the run that somebody wants to go on with, and what of it has changed since.

The run is the same if its settings are, but for ``rounds``, which may change where nothing is stretched over them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsieve.engine import Federation, Run
from fedsieve.engine.experiment import reason_not_to_prolong
from fedsieve.engine.federation import digest_of
from fedsieve.runs.schema import MANIFEST, OTHER, PUT_BACK, SOURCE, flatten_settings, read_manifest
from fedsieve.runs.source import contents_of, hashed, sources
from fedsieve.types import InputError


def check_same_run(out: Path, manifest: Mapping[str, Any], wanted: Mapping[str, Any], resume: bool) -> None:
    """Raise InputError unless the run of the manifest there is that of the one ``wanted``, ``rounds`` aside."""
    theirs, ours = flatten_settings(manifest["run"]), flatten_settings(wanted["run"])
    changed = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    if changed and changed != ["rounds"]:
        listed = ", ".join(f"{name} {theirs.get(name)} there, {ours.get(name)} here" for name in changed)
        raise InputError(f"{out} holds another run ({listed}): {OTHER}")
    measures, wanted_measures = (",".join(about["measure"]) or "none" for about in (manifest, wanted))
    if measures != wanted_measures:
        where = f"--measure {measures} there, {wanted_measures} here"
        raise InputError(f"{out} is measured otherwise ({where}): {OTHER}")
    if manifest["kernels"] != wanted["kernels"]:
        choice = f"--kernels {manifest['kernels']}, not {wanted['kernels']}"
        raise InputError(f"{out} was begun with {choice}: go on so, or {OTHER}")
    if not resume and changed:
        rounds = f"rounds {theirs['rounds']} there, {ours['rounds']} here"
        raise InputError(f"{out} already holds this run ({rounds}): add --resume to prolong it, or {OTHER}")
    if not resume:
        raise InputError(f"{out} already holds this run: add --resume to go on with it, or {OTHER}")


def check_checkpoint(out: Path, header: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Raise InputError unless the newest checkpoint is of the run that ``run.json`` says, on the same data."""
    if header.get("data") != wanted["data"]:
        raise InputError(f"{out} holds a run on other data: {OTHER}")
    if any(header.get(name) != value for name, value in wanted.items()):
        raise InputError(f"{out / MANIFEST} has been changed since the last checkpoint: {PUT_BACK}")


def check_rounds(out: Path, federation: Federation, planned: int, last: int) -> None:
    """Raise InputError unless a run that was planned for so many rounds, and is at ``last``, can have the wanted."""
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
    if changed := [name for name in sorted(theirs.keys() | ours.keys()) if theirs.get(name) != ours.get(name)]:
        names = ", ".join(str(files.get(name, name)) for name in changed)
        raise InputError(
            f"{names} changed since {out} was run with it (kept in {code_folder(out, manifest, first)}): put it back "
            f"as it was, go on with the change by --resume --accept-changes, or {OTHER}"
        )


def check_recorded_code(out: Path, run: Run, recipe: str) -> None:
    """Raise InputError, naming the file, if a directory holds a run by other code of the user's own than is there."""
    if manifest := read_manifest(out):
        files = sources(run, recipe)
        check_same_code(out, manifest, hashed(contents_of(files)), files, run.first)


def continued_manifest(manifest: Mapping[str, Any], wanted: Mapping[str, Any], t: int) -> dict[str, Any]:
    """Return the content for a run that goes on with round ``t``: what is wanted now, and what that changes.

    A version that runs no further round has changed nothing.
    """
    rounds = [about["run"]["rounds"] for about in (manifest, wanted)]
    names = ("version", "commit", "source") if t <= rounds[1] else ("source",)
    now = {name: wanted[name] for name in names}
    change = {name: [manifest.get(name), value] for name, value in now.items() if manifest.get(name) != value}
    if rounds[0] != rounds[1]:
        change["rounds"] = rounds
    changes = [*manifest["changes"], {"round": t, **change}] if change else manifest["changes"]
    return {**manifest, **now, "run": wanted["run"], "changes": changes}


def code_folder(out: Path, about: Mapping[str, Any], first: int) -> Path:
    """Return the folder of the user's own code, named by the round from which on it runs; ``first`` is the run's."""
    since = max((change["round"] for change in about["changes"] if "source" in change), default=first)
    return out / SOURCE / f"{since:06d}"


def fingerprints(federation: Federation, about: Mapping[str, Any]) -> dict[str, str]:
    """Return hashes of what a run computes: its settings, ``rounds`` aside, and who holds which examples."""
    run = {name: part for name, part in about["run"].items() if name != "rounds"}
    text = json.dumps([run, about["measure"], about["kernels"]], sort_keys=True)
    return {"run": hashlib.sha256(text.encode()).hexdigest(), "data": digest_of(federation.shards)}
