"""Runs for each of the papers' figures, and what their numbers are by arithmetic of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fabricated import fabricate
from fedsieve.report.figures import paper_figure
from fedsieve.report.plots import Line, LinePlot
from fedsieve.runs.record import read_record


def zerofl(sparsity: float = 0.9, r_mask: float = 0.1, upload: str = "top_weights") -> dict[str, Any]:
    return {"kind": "ZeroFL", "sparsity": sparsity, "r_mask": r_mask, "upload": upload}


def flash(density: float) -> dict[str, Any]:
    return {"kind": "FLASH", "density": density}


DENSE = {"kind": "FedAvg", "server": {"kind": "Average"}}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def change_rows(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    (folder / "rounds.jsonl").write_text("".join(json.dumps(change(row)) + "\n" for row in rows_of(folder)))


def panels(name: str, folders: list[Path], layers: tuple[str, ...] = ()) -> tuple[LinePlot, ...]:
    plots = paper_figure(name, [read_record(folder) for folder in folders], layers).plots
    assert all(isinstance(plot, LinePlot) for plot in plots)
    return plots  # type: ignore[return-value]


def accuracy(folders: list[Path], last: int = -1) -> tuple[float, float]:
    """Return mean and standard deviation of the accuracies at the end, by arithmetic of its own."""
    values = np.array([100 * rows_of(folder)[last]["accuracy"] for folder in folders])
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0


def close(line: Line, x: list[float], y: list[float], spread: list[float]) -> None:
    np.testing.assert_allclose(line.x, x)
    np.testing.assert_allclose(line.y, y)
    np.testing.assert_allclose(line.spread, spread, atol=1e-9)


def every_figure(tmp_path: Path, seeds: int = 2, rounds: int = 22, done: int | None = None) -> dict[str, list[Path]]:
    """Return runs for each of the figures."""
    made: dict[str, list[Path]] = {}

    def more(name: str, method: dict[str, Any], seed: int = 0, **spec: Any) -> None:
        folder = tmp_path / name / f"{len(made.get(name, []))}"
        made.setdefault(name, []).append(fabricate(folder, method, seed=seed, rounds=rounds, done=done, **spec))

    for seed in range(seeds):
        for method in (DENSE, zerofl(0.9), zerofl(0.95)):
            more("zerofl-1", method, seed, clients=1)
            more("zerofl-1", method, seed, partition="lda:1000")
            more("zerofl-1", method, seed)
        for r_mask in (0.0, 0.1, 0.2):
            more("zerofl-4", zerofl(r_mask=r_mask), seed)
            more("zerofl-4", zerofl(r_mask=r_mask, upload="top_diff"), seed)
        for method in (DENSE, flash(0.05), flash(0.1), zerofl(0.95), zerofl(0.9)):
            more("flash-1", method, seed)
            more("sparsefedpp-1", method, seed)
        for clients in (1, 20):
            more("flash-2", flash(0.05), seed, measure=True, clients=clients)
            more("flash-2", flash(0.1), seed, measure=True, clients=clients)
        more("zerofl-2", zerofl(r_mask=0.0), seed, measure=True)
        more("zerofl-2", zerofl(r_mask=0.2), seed, measure=True)
    more("zerofl-3", zerofl(), measure=True)
    return made
