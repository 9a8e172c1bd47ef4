"""The tables of benchmarks/flower.py and benchmarks/flower_bytes.py, from their results: without Flower and Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedsieve.runs.units import format_ratio

RESULTS = Path(__file__).parent / "results"
ROUNDS, BYTES = RESULTS / "flower.json", RESULTS / "flower_bytes.json"
CLIENTS, WORKERS = 10, 2
AIM = 0.1
"""How much longer than a plain app's a round without work may take."""
WAYS = {
    "plain": "plain app",
    "engine": "FedSieve's engine",
    "bytes_engine": "plain app, as many bytes",
    "same": "plain app with SparseMod",
    "bytes_same": "plain app, as many bytes",
    "plain_moved": "plain app, moved",
    "moved": "SparseMod, moved",
    "bytes_moved": "plain app, as many bytes",
    "tenth": "SparseMod(top=0.1), moved",
}


def rounds_table() -> str:
    """Return the seconds of rounds, and a client's share of their processor seconds."""
    lines = [
        "| model | way | MB down, up a client | a round, s (fastest to slowest) | a client, s | CPU-s |",
        "|---|---|---|---|---|---|",
    ]
    for name, own in json.loads(ROUNDS.read_text())["models"].items():
        for way, got in own["ways"].items():
            sizes = ", ".join(f"{got[f'bytes_{d}'] / 1e6:.2f}" for d in ("down", "up"))
            spread = f"{got['seconds']:.2f} ({got['fastest']:.2f} to {got['slowest']:.2f})"
            each = f"{got['seconds'] / CLIENTS:.3f} | {got['cpu_seconds'] / CLIENTS:.3f}"
            label = f"{name}, {own['parameters'] / 1e6:.2f} M" if way == "plain" else ""
            lines.append(f"| {label} | {WAYS[way]} | {sizes} | {spread} | {each} |")
    return "\n".join(lines)


def aim_table() -> str:
    """Return how much longer rounds take than a plain app's, and than one's that sends as many bytes."""
    lines = [
        "| model | way | s a round: it, plain app, as many bytes | beyond the plain app | beyond as many bytes | aim |",
        "|---|---|---|---|---|---|",
    ]
    for name, own in json.loads(ROUNDS.read_text())["models"].items():
        for way in ("engine", "same"):
            it, plain, alike = (own["ways"][w]["seconds"] for w in (way, "plain", f"bytes_{way}"))
            beyond = [it / other - 1 for other in (plain, alike)]
            met = ["missed", "met against the plain app", "met"][(beyond[0] <= AIM) + (max(beyond) <= AIM)]
            label = f"{name}, {own['parameters'] / 1e6:.2f} M | {WAYS[way]} | {it:.2f}, {plain:.2f}, {alike:.2f}"
            lines.append(f"| {label} | {100 * beyond[0]:+.0f} % | {100 * beyond[1]:+.0f} % | {met} |")
    return "\n".join(lines)


def costs_table() -> str:
    """Return what FedSieve's engine costs a client that does nothing, and what larger rounds then take at least."""
    lines = [
        "| model | a client: seconds of a worker, CPU-s | 100 a round, 2 workers | 1,000 a round, 100 workers |",
        "|---|---|---|---|",
    ]
    for name, own in json.loads(ROUNDS.read_text())["models"].items():
        got = own["ways"]["engine"]
        worker = got["seconds"] * WORKERS / CLIENTS
        rounds = " | ".join(f"{k * worker / w:.2g} s" for k, w in ((100, 2), (1000, 100)))
        label = f"{name}, {own['parameters'] / 1e6:.2f} M parameters"
        lines.append(f"| {label} | {worker:.3f}, {got['cpu_seconds'] / CLIENTS:.3f} | {rounds} |")
    return "\n".join(lines)


def bytes_table() -> str:
    """Return the kilobytes of a client's messages in a round of the quickstart, and the model's accuracy."""
    results: dict[str, Any] = json.loads(BYTES.read_text())["ways"]
    plain = results["plain Flower"]
    lines = [
        "| | up, kB a client and round | than plain | down, kB | than plain | accuracy, % |",
        "|---|---|---|---|---|---|",
    ]
    for name, got in results.items():
        ways = [f"{got[way] / 1e3:.1f} | {format_ratio(plain[way], got[way])}" for way in ("up", "down")]
        lines.append(f"| {name} | {ways[0]} | {ways[1]} | {100 * got['accuracy']:.1f} |")
    return "\n".join(lines)
