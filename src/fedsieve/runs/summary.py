"""A run in numbers: what ``summary.json`` holds."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fedsieve.client.process import peak_memory_mb
from fedsieve.engine import Federation


def summary(rows: list[dict[str, Any]], federation: Federation) -> dict[str, Any]:
    """Return the run so far in numbers: sums over its rounds, the last test, and what one upload weighs in training."""
    method = federation.run.method
    added = ("bytes_up", "bytes_down", "bytes_dense_up", "bytes_dense_down", "multiply_adds", "multiply_adds_dense")
    tested = [r["accuracy"] for r in rows if r["accuracy"] is not None]
    validated = [v for r in rows if (v := r.get("accuracy_validation")) is not None]
    pruned = [r["accuracy_pruned"] for r in rows if "accuracy_pruned" in r]
    trained = [r for r in rows if r["round"] > 0]
    return {
        "method": method.name,
        "dataset": federation.dataset.name,
        "rounds": rows[-1]["round"],
        "accuracy": tested[-1] if tested else None,
        "accuracy_validation": validated[-1] if validated else None,
        **({"accuracy_pruned": pruned[-1]} if pruned else {}),
        "density": rows[-1]["density"],
        "density_of_all": rows[-1]["density_of_all"],
        **{name: sum(r[name] for r in rows) for name in (*added, "seconds")},
        "multiply_adds_not_counted": [*federation.not_counted],
        "uploads": sum(len(r["clients"]) for r in trained),
        "upload_bytes": sum(r["bytes_up"] for r in trained) / max(sum(len(r["clients"]) for r in trained), 1),
        "paper_bytes_up": method.paper_bytes(federation.model()),
        "peak_memory_mb": peak_memory_mb(),
        "left_out": [one for r in rows for one in r.get("left_out", [])],
        **_trained_by([r for r in rows if "kernels" in r]),
    }


def _trained_by(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return which way the clients trained, why it was dense, and how long a step took."""
    steps = sum(r["steps"] for r in rows)
    return {
        "kernels": dict(sum((Counter(r["kernels"]) for r in rows), Counter())),
        "dense_because": next((r["dense_because"] for r in rows if r["dense_because"]), None),
        "steps": steps,
        "ms_per_step": sum((r["ms_per_step"] or 0) * r["steps"] for r in rows) / steps if steps else None,
    }
