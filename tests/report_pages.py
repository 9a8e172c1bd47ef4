"""Run directories made up for the tests of the report page, and pages taken apart."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from fedsieve.report import report
from fedsieve.report.results import result_cells
from fedsieve.runs.record import read_record

CLASSES = [str(i) for i in range(10)]


def write_run(
    folder: Path, *, recipe: str = "zerofl.digits", rounds: int = 12, done: int | None = None, **spec: Any
) -> Path:
    """Write a synthetic run directory and return it; ``spec``: seed, density, method, every and more."""
    folder.mkdir(parents=True)
    done = rounds if done is None else done
    rows = [row_of(t, rounds, **spec) for t in range(1, done + 1)]
    about = about_of(recipe, rounds, **spec)
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "partition.json").write_text(json.dumps(partition_of(**spec)))
    if done == rounds:
        (folder / "summary.json").write_text(json.dumps(summary_of(about, rows, **spec)))
    return folder


def row_of(
    t: int, rounds: int, seed: int = 0, density: float = 0.1, dense: int = 520_000, **spec: Any
) -> dict[str, Any]:
    """Return a round that learns along an exponential, with noise drawn from the seed and the round."""
    noise = np.random.default_rng([seed, t])
    clients = sorted(noise.choice(spec.get("clients", 20), 5, replace=False).tolist())
    reached = spec.get("top", 0.95) - 0.85 * float(np.exp(-4 * t / rounds)) + 0.012 * float(noise.standard_normal())
    sent = min(dense, dense * density * 1.4 + 600)
    evaluated = t % spec.get("every", 1) == 0 or t == rounds
    refused = [{"client": clients[0], "reason": "values that are not finite"}] if t in spec.get("refuse", ()) else []
    return {
        "round": t,
        "clients": clients,
        "accuracy": reached if evaluated else None,
        "density": density * (1 + spec.get("spread", 0.6) * float(np.exp(-6 * t / rounds))),
        "bytes_up": int(5 * sent * (1 + 0.03 * noise.standard_normal())),
        "bytes_down": int(5 * min(dense, 1.7 * sent)),
        "bytes_dense_up": 5 * dense,
        "bytes_dense_down": 5 * dense,
        "seconds": 0.8 + 0.1 * float(noise.random()),
        "refused": refused,
        "loss": 2.3 * float(np.exp(-3 * t / rounds)),
        "multiply_adds": 4.1e10 * (0.3 + 0.7 * density),
        "multiply_adds_dense": 4.1e10,
    }


def about_of(recipe: str, rounds: int, seed: int = 0, **spec: Any) -> dict[str, Any]:
    method = {"kind": "ZeroFL", "sparsity": 0.9, "r_mask": 0.1, "upload": "top_weights"}
    task = {"model": "digits_net", "dataset": "digits", "partition": "lda:1.0", "clients": spec.get("clients", 20)}
    return {
        "recipe": recipe,
        "version": "0.1.0",
        "commit": spec.get("commit", "3c7402f"),
        "engine": "local",
        "device": "cpu",
        "started": f"2026-01-0{seed % 9 + 1}T09:30:00+00:00",
        "hardware": {"cpu": "Example 2", "cores": 2, "memory_mb": 16000, "python": "3.11.7", "torch": "2.6.0"},
        "run": {
            "method": spec.get("method", method),
            "task": task | spec.get("task", {}),
            "rounds": rounds,
            "per_round": 5,
            "epochs": 1,
            "batch": spec.get("batch", 16),
            "lr": spec.get("lr", 0.1),
            "lr_end": 0.01,
            "momentum": 0.0,
            "weight_decay": 0.0,
            "seed": seed,
        },
    }


def partition_of(clients: int = 20, alpha: float = 1.0, each: int = 72, **spec: Any) -> dict[str, Any]:
    classes = spec.get("classes", CLASSES)
    draw = np.random.default_rng(7)
    shares = draw.dirichlet([alpha] * len(classes), clients)
    counts = [draw.multinomial(int(each * draw.uniform(0.6, 1.4)), share).tolist() for share in shares]
    return {"classes": classes, "counts": counts}


def summary_of(about: dict[str, Any], rows: list[dict[str, Any]], **spec: Any) -> dict[str, Any]:
    sums = (
        "bytes_up",
        "bytes_down",
        "bytes_dense_up",
        "bytes_dense_down",
        "multiply_adds",
        "multiply_adds_dense",
        "seconds",
    )
    return {
        "method": about["run"]["method"]["kind"].lower(),
        "dataset": about["run"]["task"]["dataset"],
        "rounds": len(rows),
        "accuracy": rows[-1]["accuracy"],
        "density": rows[-1]["density"],
        **{name: sum(row[name] for row in rows) for name in sums},
        "peak_memory_mb": 412.0,
        "paper_bytes_up": spec.get("paper", 93_600.0),
    }


class Page(HTMLParser):
    """A page taken apart: its tags, its text, and the cells of its tables' rows as (text, numbers)."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[tuple[str, list[float]]]] = []
        self.texts: list[str] = []
        self.cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append(("", []))
            self.cell = True
        if tag == "data":
            self.rows[-1][-1][1].append(float(attributes["value"] or "nan"))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.cell:
            text, numbers = self.rows[-1][-1]
            self.rows[-1][-1] = (text + data, numbers)

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag not in ("td", "th")

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def result(self, label: str) -> list[tuple[str, list[float]]]:
        """Return the cells of a run's line in the table of results, without that of a step's time."""
        (row,) = (row for row in self.rows if len(row) == 10 and row[0][0].strip().startswith(label))
        return row[:7] + row[8:]


def page_of(tmp_path: Path, *runs: Path) -> Page:
    report(list(runs), tmp_path / "report.html")
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def rows_in(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def cells_of(run: Path) -> list[tuple[str, list[float]]]:
    """Return the cells that a run's line of the table has, as ``Page.result`` does, without a page."""
    found: list[tuple[str, list[float]]] = [("", [])]
    for cell in result_cells([read_record(run)]):
        items = [item for line in cell for item in line]
        values = [item for item in items if not isinstance(item, str)]
        text = "".join(item if isinstance(item, str) else item.text for item in items)
        found.append((text, [value.number for value in values if value.number is not None]))
    return found[:7] + found[8:]
