"""Run directories: written by a run of the tiny task, and compared."""

import json
from pathlib import Path
from typing import Any

from fedsieve import Run, local
from fedsieve.engine.setup import open_run
from fedsieve.runs.execution import Execution
from fedsieve.runs.record import read_rows
from fedsieve.runs.recorder import record_run
from tiny import TIMES, tiny_run

RECIPE = "tests.tiny"


def go(out: Path, run: Run, **options: Any) -> list[int]:
    return [r.t for r in record_run(out, open_run(run), local(), RECIPE, Execution(**options))]


def same_run(a: Path, b: Path) -> bool:
    """The models are equal to the byte, the rows but for their times."""
    rows = [[row | TIMES for row in read_rows(out)] for out in (a, b)]
    models = [(out / "model.safetensors").read_bytes() for out in (a, b)]
    return rows[0] == rows[1] and models[0] == models[1]


def flat(method: object, rounds: int) -> Run:
    return tiny_run(method, rounds=rounds, lr_end=0.1)


def about(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "run.json").read_text())
    return found
