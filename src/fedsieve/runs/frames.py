"""Run directories as pandas frames: a row a round and run, and a row a run, with the settings as columns."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from fedsieve.runs.record import MANIFEST, RunRecord, flatten_settings, read_record
from fedsieve.types import InputError

HOW = ("recipe", "engine", "device", "precision", "version")
"""What run.json says beside the settings that is a column."""
SETTING = "setting."
"""What stands before the name of a setting that a row has a column of."""


class RunFrames(NamedTuple):
    """Runs as two frames. Settings have their dotted names (``method.sparsity``), lists among them are JSON texts."""

    rows: Any
    """A row a round and run: ``run`` (its directory), ``round``, what ``rounds.jsonl`` says, then the settings."""
    summaries: Any
    """A row a run: ``run``, ``finished``, ``round`` (its last), what ``summary.json`` says, then the settings."""


def load_runs(pattern: str | Path | Iterable[str | Path]) -> RunFrames:
    """Return the runs in the directories that a pattern (``runs/*``), or several, name. Raises InputError.

    Parts of a column have dotted names (``kernels.sparse``). Of a run that goes on the summary is empty. What a pattern
    matches and is no run is passed over; a directory that is named is not.
    """
    try:
        pandas = import_module("pandas")
    except ImportError:
        raise InputError("load_runs needs a package: pip install pandas") from None
    runs = [read_record(folder) for folder in run_folders(pattern)]
    rows = [_columns({"run": str(run.folder), **row}, run) for run in runs for row in run.rows]
    return RunFrames(pandas.DataFrame(rows), pandas.DataFrame([_columns(_summary(run), run) for run in runs]))


def run_folders(pattern: str | Path | Iterable[str | Path]) -> list[Path]:
    """Return the run directories that patterns name, each once. Raises InputError if there is none."""
    patterns = [pattern] if isinstance(pattern, str | Path) else list(pattern)
    folders: dict[Path, None] = {}
    for text in map(str, patterns):
        if Path(text).exists() or not glob.has_magic(text):
            folders[Path(text)] = None
        else:
            matches = [Path(match) for match in sorted(glob.glob(text))]  # noqa: PTH207  # absolute ones too
            folders |= dict.fromkeys(match for match in matches if (match / MANIFEST).exists())
    if not folders:
        raise InputError(f"no run directory is {' or '.join(map(str, patterns)) or 'named'}: name some, such as runs/*")
    return list(folders)


def _summary(run: RunRecord) -> dict[str, Any]:
    about = {"run": str(run.folder), "finished": run.whole, "round": run.last_round}
    return about | {name: value for name, value in (run.summary or {}).items() if name != "rounds"}


def _columns(row: Mapping[str, Any], run: RunRecord) -> dict[str, Any]:
    """Return a row's columns, those of its parts by dotted names, and the settings under names that it has not."""
    own = {name: value for name, value in flatten_settings(row).items() if name}
    how = {name: run.manifest[name] for name in HOW if name in run.manifest}
    settings = flatten_settings(run.manifest.get("run") or {}) | how
    settings.pop("kind", None)  # that it is a Run
    texts = {name: json.dumps(value) if isinstance(value, list) else value for name, value in settings.items()}
    return own | {SETTING + name if name in own else name: value for name, value in texts.items()}
