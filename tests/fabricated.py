"""Run directories made up for the tests of figures: whole, cut short, with and without measured masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

CLASSES = {
    "FedAvg": "fedavg",
    "ZeroFL": "zerofl",
    "FLASH": "flash",
    "HeteroFLASH": "flash",
    "SparseFedPP": "sparsefedpp",
    "TopK": "topk",
    "NST": "nst",
    "PDST": "pdst",
    "Swat": "swat",
}
LAYERS = {"conv1.weight": 100, "conv2.weight": 5_000, "fc1.weight": 36_864}


def fabricate(
    folder: Path,
    method: dict[str, Any],
    *,
    seed: int = 0,
    rounds: int = 40,
    done: int | None = None,
    measure: bool = False,
    warm_up: bool = False,
    every: int = 1,
    layers: dict[str, int] = LAYERS,
    about: dict[str, Any] | None = None,
    **task: Any,
) -> Path:
    """Write a run directory and return it; ``task``: clients, partition, dataset; ``about``: more of run.json."""
    folder.mkdir(parents=True)
    done = rounds if done is None else done
    held = {"model": "net", "dataset": "digits", "partition": "lda:1.0", "clients": 20} | task
    run = {"method": method, "task": held, "rounds": rounds, "per_round": 5, "lr": 0.1, "seed": seed}
    (folder / "run.json").write_text(json.dumps({"recipe": "made.up", **declared(method), "run": run} | (about or {})))
    noise = np.random.default_rng([seed, len(str(method))])
    turns = range(0 if warm_up else 1, done + 1)
    rows = [_row(t, rounds, method, noise, measure, layers, every) for t in turns]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if done == rounds:
        (folder / "summary.json").write_text(json.dumps({"rounds": len(rows), "accuracy": rows[-1]["accuracy"]}))
    if measure:
        _masks(folder / "masks", sorted({1, *range(20, done + 1, 20), done}), noise, layers)
    return folder


def declared(method: dict[str, Any]) -> dict[str, Any]:
    """Return what a method says of itself in run.json: the class of its kind, and the density that it aims at."""
    kind = method["kind"]
    where = f"fedsieve.methods.{CLASSES[kind]}:{kind}" if kind in CLASSES else f"own:{kind}"
    target = max(method["densities"]) if "densities" in method else kept(method)
    return {"class": where, "target_density": target}


def kept(method: dict[str, Any]) -> float:
    """Return the density of a method."""
    return float(method.get("density", 1 - method.get("sparsity", 0)))


def _row(
    t: int, rounds: int, method: dict[str, Any], noise: np.random.Generator, measure: bool, layers: Any, every: int
) -> dict[str, Any]:
    density = kept(method)
    reached = 0.95 - 0.25 * (1 - density) ** 8 - 0.8 * float(np.exp(-4 * t / rounds)) + 0.01 * noise.standard_normal()
    row = {
        "round": t,
        "clients": [0, 1, 2, 3, 4],
        "accuracy": min(max(float(reached), 0.1), 1.0) if t % every == 0 or t == rounds else None,
        "density": density,
        "bytes_up": int(5e5 * (density + 0.1)),
        "bytes_down": 500_000,
    }
    if measure:
        row["mismatch"] = None if t <= 1 else float(0.4 + 0.5 * np.exp(-t / rounds) + 0.01 * noise.standard_normal())
        row["layers"] = {
            name: float(min(1, density * (1.5 + i / 4) + 0.5 * np.exp(-t / 10))) for i, name in enumerate(layers)
        }
    return row


def _masks(folder: Path, rounds: list[int], noise: np.random.Generator, layers: dict[str, int]) -> None:
    folder.mkdir()
    importance = {name: noise.random(numel) for name, numel in layers.items()}
    for t in rounds:
        write_masks(
            folder / f"{t:06d}.safetensors",
            {name: 0.85 * value + 0.15 * noise.random(len(value)) > 0.85 for name, value in importance.items()},
        )


def write_masks(path: Path, supports: dict[str, Any], numel: Any = None) -> None:
    """Write supports as ``--measure masks`` does."""
    told = {name: len(bits) for name, bits in supports.items()} if numel is None else numel
    save_file({name: np.packbits(bits) for name, bits in supports.items()}, path, {"numel": json.dumps(told)})
