"""The report page: complete, exact, closed to the outside, and clear about what it cannot read."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fedsieve.report import report
from fedsieve.report.configurations import group_configurations
from fedsieve.report.figures import paper_figures
from fedsieve.report.partitions import gather_columns
from fedsieve.report.svg import swatch
from fedsieve.runs.progress import summary_table
from fedsieve.runs.record import RunRecord, read_record
from fedsieve.runs.units import format_ratio
from fedsieve.types import InputError

CHROMIUM = shutil.which("chromium")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"]
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


def test_what_was_not_counted_stands_beside_the_multiply_adds(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for names, said in (["aten::<b>", "aten::fft"], True), ([], False), (5, False):
        change(run / "summary.json", multiply_adds_not_counted=names)
        assert ("not counted: aten::<b>, aten::fft" in page_of(tmp_path, run).result("ZeroFL")[6][0]) == said


def test_every_run_is_listed_and_told_apart_by_what_differs(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run-{seed}", seed=seed) for seed in (0, 1)]
    runs.append(write_run(tmp_path / "slow", seed=1, lr=0.01))
    runs.append(
        write_run(tmp_path / "dense", recipe="fedavg.digits", method={"kind": "FedAvg", "server": {"kind": "Average"}})
    )
    page = page_of(tmp_path, *runs)
    assert "4 runs of 3 configurations on digits" in page.text
    for label in ("ZeroFL, lr 0.1", "ZeroFL, lr 0.01", "FedAvg, lr 0.1"):
        assert [row for row in page.rows if len(row) == 10 and row[0][0].strip().startswith(label)]
    for label in ("ZeroFL, lr 0.1, seed 0run-0", "ZeroFL, lr 0.1, seed 1run-1", "FedAvg, lr 0.1, seed 0dense"):
        assert page.result(label)
    assert "ZeroFL(sparsity=0.9, r_mask=0.1, upload=top_weights)" in page.text
    assert "FedAvg(server=Average)" in page.text
    assert page.text.count("finished, 12 rounds") == 3


def test_the_way_of_training_is_counted_over_all_seeds(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{seed}", seed=seed, rounds=3) for seed in (0, 1)]
    for kernels, run in zip(({"sparse": 3, "dense": 2}, {"sparse": 5}), runs, strict=True):
        rows = [row | {"kernels": kernels, "ms_per_step": 2.0, "steps": 7} for row in rows_in(run)]
        (run / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = [row[7][0] for row in page_of(tmp_path, *runs).rows if len(row) == 10]
    assert steps == ["A step", "2.00 mssparse 24, dense 6", "A step", "2.00 mssparse 9, dense 6", "2.00 mssparse"]


def test_of_runs_with_the_same_settings_one_counts(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / place, commit=place) for place in ("old", "new", "going")]
    for day, run in enumerate(runs[:2], 1):
        change(run / "run.json", started=f"2026-02-{day:02d}T09:30:00+00:00")
    (runs[2] / "summary.json").unlink()
    with pytest.warns(UserWarning, match=r"one counts .*: .*/new, not .*/old, .*/going$"):
        page = page_of(tmp_path, *runs)
    assert page.result("ZeroFL")
    assert "new" in page.texts
    assert not {"old", "going"} & set(page.texts)


def test_runs_that_say_nothing_of_their_settings_are_called_by_their_folders(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / place) for place in ("here/a", "here/b", "there/b")]
    for run in runs:
        (run / "run.json").write_text("{}")
    page = page_of(tmp_path, *runs)
    for label in ("a", "b (2)", "b (3)"):
        assert page.result(label)


def run_of(method: str = "ZeroFL", seed: int = 0, about: dict[str, Any] | None = None, **fields: Any) -> RunRecord:
    """Return a run of nothing but settings, their names written with two underscores for a dot."""
    run: dict[str, Any] = {"method": {"kind": method}, "seed": seed}
    for name, value in fields.items():
        *path, last = name.split("__")
        node = run
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return RunRecord(Path("x"), {"run": run} | (about or {}), [], None, [], None)


@pytest.mark.parametrize(
    ("runs", "labels"),
    [
        ([run_of()], ["ZeroFL"]),
        ([run_of("FLASH"), run_of("NST", lr=0.2)], ["FLASH", "NST"]),
        ([run_of(lr=0.1), run_of(lr=0.2), run_of(lr=0.2, seed=1)], ["lr 0.1", "lr 0.2"]),
        (
            [run_of(method__sparsity=s, task__partition=p, lr=s) for s in (0.9, 0.95) for p in ("iid", "lda:1.0")],
            [f"sparsity {s}, partition {p}" for s in (0.9, 0.95) for p in ("iid", "lda:1.0")],
        ),
        (
            [
                run_of(kind, about={"target_density": d}, **{f"method__{name}": of(d)})
                for kind, name, of in (("ZeroFL", "sparsity", lambda d: 1 - d), ("FLASH", "density", float))
                for d in (0.1, 0.25)
            ],
            [f"{kind}, density {d}" for kind in ("ZeroFL", "FLASH") for d in (0.1, 0.25)],
        ),
        ([run_of(), run_of(bound__kind="Running")], ["default", "bound Running"]),
        ([run_of(about={"kernels": k}) for k in ("sparse", "dense")], ["kernels sparse", "kernels dense"]),
        ([run_of(about={"engine": e}) for e in ("local", "pool:2")], ["engine local", "engine pool:2"]),
        ([run_of(about={"engine": e}, seed=i) for i, e in enumerate(("local", "pool:2"))], ["ZeroFL"]),
        ([run_of(about={"class": c}) for c in ("a:ZeroFL", "b:ZeroFL")], ["class a:ZeroFL", "class b:ZeroFL"]),
        ([run_of(x="a" * 40 + c) for c in "bc"], [f"x {'a' * 27}… ({i})" for i in (1, 2)]),
    ],
)
def test_labels_are_the_fewest_settings_that_tell_configurations_apart(
    runs: list[RunRecord], labels: list[str]
) -> None:
    assert [one.label for one in group_configurations(runs)] == labels


def test_seeds_are_one_row_of_means_with_their_spread(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"z{seed}", seed=seed) for seed in (2, 0, 1)]
    runs.append(write_run(tmp_path / "going", seed=3, done=7))
    runs.append(write_run(tmp_path / "alone", method={"kind": "FedAvg"}))
    for i, run in enumerate(runs[:3]):
        change(run / "summary.json", accuracy=0.9 + i / 50, accuracy_validation=0.8, bytes_up=1e6 + 2e5 * i)
        change(run / "summary.json", density_of_all=0.5 + i / 10)
    page = page_of(tmp_path, *runs)
    (row,) = (row for row in page.rows if len(row) == 10 and row[0][0].strip().startswith("ZeroFL4 seeds"))
    assert "3 of 4 finished, 7 to 12 of 12 rounds" in row[0][0]
    assert row[1] == ("92.0 ± 2.0 %validation 80.0 %", [pytest.approx(0.92), pytest.approx(0.8)])
    assert "of all 60.0 ± 10.0 %" in row[2][0]
    assert row[3][0].startswith("1.20 ± 0.20 MBdense 31.2 MB26.0x less")
    assert page.result("FedAvg, seed 0alone")[1][0].count("±") == 0
    for seed in range(4):
        assert page.result(f"ZeroFL, seed {seed}")
    bands = (tmp_path / "report.html").read_text().count('id="accuracy-FillBetween')
    assert bands == 1


def test_a_directory_given_twice_counts_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    report([run], tmp_path / "once.html")
    report([run, run], tmp_path / "twice.html")
    assert (tmp_path / "once.html").read_bytes() == (tmp_path / "twice.html").read_bytes()


@pytest.mark.parametrize("done", [12, 7])
def test_the_table_holds_the_numbers_of_the_run(tmp_path: Path, done: int) -> None:
    run = write_run(tmp_path / "run", done=done)
    rows = rows_in(run)
    total = {name: sum(row[name] for row in rows) for name, value in rows[0].items() if isinstance(value, int | float)}
    label, accuracy, density, up, down, upload, work, time, memory = page_of(tmp_path, run).result("ZeroFL")
    assert ("7 of 12 rounds" in label[0]) == (done == 7)
    assert accuracy == (f"{100 * rows[-1]['accuracy']:.1f} %", [rows[-1]["accuracy"]])
    assert density == (f"{100 * rows[-1]['density']:.1f} %", [rows[-1]["density"]])
    for cell, name in ((up, "up"), (down, "down")):
        assert cell[1] == [total[f"bytes_{name}"], total[f"bytes_dense_{name}"]]
        assert f"{total[f'bytes_dense_{name}'] / total[f'bytes_{name}']:.1f}x less" in cell[0]
    assert upload[1] == [total["bytes_up"] / (5 * done), *[93_600.0] * (done == 12)]
    assert work[1] == [total["multiply_adds"], total["multiply_adds_dense"]]
    assert time == (f"{total['seconds']:.1f} s", [total["seconds"]])
    assert memory == (("412 MB", [412.0]) if done == 12 else ("–", []))


@pytest.mark.parametrize(
    ("size", "dense", "said"),
    [
        (999, 999, "999 Bdense 999 Bthe same"),
        (1_000, 12_345, "1.00 kBdense 12.3 kB12.3x less"),
        (999_999, 500_000, "1.00 MBdense 500 kB2.0x more"),
        (2.5e9, 2.5e12, "2.50 GBdense 2.50 TB1,000x less"),
        (0, 10, "0 Bdense 10 B"),
    ],
)
def test_bytes_read_well(tmp_path: Path, size: float, dense: float, said: str) -> None:
    run = write_run(tmp_path / "run")
    change(run / "summary.json", bytes_up=size, bytes_dense_up=dense)
    assert page_of(tmp_path, run).result("ZeroFL")[3][0] == said


def test_factors_say_less_or_more_never_a_fraction_of_fewer(tmp_path: Path) -> None:
    for reference, measured, cell, sentence in (
        (9.64, 1, "9.6x less", "9.6 times less than dense"),
        (0.34, 1, "2.9x more", "2.9 times more than dense"),
        (1.04, 1, "1.04x less", "1.04 times less than dense"),
        (1, 1.004, "the same", "the same as dense"),
        (2e5, 1, "200,000x less", "200,000 times less than dense"),
        (0, 1, "", ""),
        (1, 0, "", ""),
        (math.inf, 1, "", ""),
        (math.nan, 1, "", ""),
    ):
        assert (format_ratio(reference, measured), format_ratio(reference, measured, than="dense")) == (cell, sentence)
    assert format_ratio(1, 3, ("fewer", "more"), "dense") == "3.0 times more than dense"
    run = write_run(tmp_path / "run")
    change(
        run / "summary.json",
        multiply_adds=1.2e11,
        multiply_adds_dense=4.1e10,
        upload_bytes=1e3,
        accuracy_validation=None,
        density_of_all=0.1,
        multiply_adds_not_counted=[],
        kernels={"sparse": 3},
        ms_per_step=1.5,
        bytes_up=2000,
        bytes_dense_up=1000,
    )
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(summary_table(run))
    said = console.export_text()
    assert "2.9 times more than dense" in said
    assert "2.0 times more than dense" in said
    assert "fewer" not in said


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.81, "0.8 s"), (59.4, "59.4 s"), (61, "1 min 1 s"), (7384, "2 h 3 min")]
)
def test_durations_read_well(tmp_path: Path, seconds: float, said: str) -> None:
    run = write_run(tmp_path / "run")
    change(run / "summary.json", seconds=seconds)
    assert page_of(tmp_path, run).result("ZeroFL")[7][0] == said


def test_the_page_is_whole_and_closed_to_the_outside(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{i}", seed=i, density=0.02 * 4**i, alpha=10.0**-i) for i in range(3)]
    page = page_of(tmp_path, *runs)
    text = (tmp_path / "report.html").read_text()
    assert "http://" not in text
    assert "https://" not in text
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "embed", "base", "form")]
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert page.named("script") == [{}]
    (policy,) = (meta["content"] for meta in page.named("meta") if meta.get("http-equiv"))
    assert policy == f"default-src 'none';script-src 'sha256-{digest}';style-src 'unsafe-inline';img-src data:"
    for attributes in (attributes for _, attributes in page.tags):
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
        assert not [name for name in attributes if name.startswith("on")]


def test_every_id_is_unique_and_every_reference_finds_its_own(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{i}", seed=i, alpha=10.0**-i) for i in range(3)]
    page = page_of(tmp_path, *runs)
    ids = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    assert ids.most_common(1)[0][1] == 1
    text = (tmp_path / "report.html").read_text()
    references = re.findall(r'(?:url\(#|href="#)([^)"]+)', text)
    assert references
    assert set(references) <= set(ids)


def test_every_picture_says_what_it_shows(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    page = page_of(tmp_path, run)
    says = [svg.get("aria-label") or "" for svg in page.named("svg") if svg.get("role") == "img"]
    assert [line.partition(".")[0] for line in says[:5]] == [
        "Accuracy over rounds",
        "Accuracy over bytes sent",
        "Density over rounds",
        "Bytes up in a round",
        "Bytes down in a round",
    ]
    ends = [100 * rows_in(run)[place]["accuracy"] for place in (0, -1)]
    assert f"ZeroFL: {ends[0]:.4g} to {ends[1]:.4g}" in says[0]
    assert "20 clients" in says[5]
    assert all(svg.get("role") == "img" or svg.get("aria-hidden") == "true" for svg in page.named("svg"))


def test_looks_differ_by_colour_dash_and_marker_together() -> None:
    samples = [re.sub(r'"?#?\bkey-[^"]*"', "", swatch("key", look)) for look in range(49)]
    assert len(set(samples)) == 49
    shapes = [re.sub(r"var\(--\w+\)", "", sample) for sample in samples]
    assert len(set(shapes[:7])) == 7
    assert all(len({shapes[i + 7 * k] for k in range(4)}) == 4 for i in range(7))
    assert swatch("key", 3) == swatch("key", 3)


def test_a_configuration_has_one_label_and_one_look_wherever_it_stands(tmp_path: Path) -> None:
    """Of eleven methods with three seeds, and of two of them at a second density."""
    methods = [{"kind": f"M{i}", "density": 0.1} for i in range(11)] + [
        {"kind": f"M{i}", "density": 0.2} for i in (3, 8)
    ]
    runs = []
    for i, method in enumerate(methods):
        for seed in range(3):
            run = write_run(tmp_path / f"{i}-{seed}", seed=seed, method=method, rounds=3, refuse=(2,) if i else ())
            change(run / "run.json", target_density=method["density"], **{"class": f"own:{method['kind']}"})
            runs.append(run)
    every = group_configurations([read_record(run) for run in runs])
    names = {one.label: one.look for one in every}
    assert list(names) == [f"{method['kind']}, density {method['density']}" for method in methods]
    drawn = {one.name: one for one in paper_figures([run for one in every for run in one.runs])}
    assert drawn.keys() == {"zerofl-1", "flash-1", "sparsefedpp-1"}
    for panel in (*drawn["zerofl-1"].plots, drawn["flash-1"].plots[0]):
        assert {label: line.look for label, line in panel.lines.items()} == names
    for panel in (drawn["flash-1"].plots[1], *drawn["sparsefedpp-1"].plots):
        looks = {label: line.look for label, line in panel.lines.items()}
        assert {label: look for label, look in looks.items() if label in names}.items() <= names.items()
        assert {label for label in looks if label not in names} == {"M3", "M8"}
        assert not {looks["M3"], looks["M8"]} & set(names.values())
    page = page_of(tmp_path, *runs)
    assert len([one for one in page.named("ul") if one.get("class") == "legend many"]) == 4
    assert len([row for row in page.rows if len(row) == 10]) == 1 + 13 + 1 + 39
    assert [attributes["class"] for attributes in page.named("table")][:2] == ["results sorts"] * 2
    assert "36 × values that are not finite" in page.text
    assert len(page.named("image")) == 2


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    pages = []
    for place in ("here", "there"):
        runs = [write_run(tmp_path / place / f"run-{seed}", seed=seed) for seed in (0, 1)]
        report(runs, tmp_path / place / "report.html")
        pages.append((tmp_path / place / "report.html").read_bytes())
    assert pages[0] == pages[1]


def test_what_files_say_is_text_never_markup(tmp_path: Path) -> None:
    bad = "<script>alert('x')</script><img src=x onerror=alert(1)> & \"quoted\""
    run = write_run(
        tmp_path / "run", recipe=bad, method={"kind": bad, "x": bad}, classes=[bad, "$\\frac{$"], refuse=(2,)
    )
    write_run(tmp_path / "other", recipe=bad, task={"dataset": bad, "partition": bad}, commit=bad)
    change(run / "partition.json", classes=["</text><script>", "$\\frac{1$", *CLASSES[2:]], counts=[[1] * 10] * 3)
    with (run / "rounds.jsonl").open("a") as file:
        file.write(json.dumps(row_of(12, 12) | {"refused": [{"client": 1, "reason": bad}]}) + "\n")
    page = page_of(tmp_path, run, tmp_path / "other")
    assert page.named("script") == [{}]
    assert not page.named("img")
    assert bad in page.text
    assert f"1 × {bad}" in page.text
    assert "</text><scr…" in page.text
    assert "$\\frac{1$" in page.text


def test_a_row_that_a_crash_tore_off_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", done=5)
    torn = json.dumps(row_of(6, 12) | {"refused": [{"client": 0, "reason": "é"}]}, ensure_ascii=False).encode()
    with (run / "rounds.jsonl").open("ab") as file:
        file.write(torn[: torn.index("é".encode()) + 1])
    page = page_of(tmp_path, run)
    assert "5 of 12 rounds" in page.text
    assert page.result("ZeroFL")[3][1][0] == sum(row_of(t, 12)["bytes_up"] for t in range(1, 6))


def test_a_run_stopped_early_is_not_called_finished(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert (run / "summary.json").exists()
    about = json.loads((run / "run.json").read_text())
    about["run"]["rounds"] = 400
    (run / "run.json").write_text(json.dumps(about))
    page = page_of(tmp_path, run)
    assert "12 of 400 rounds" in page.text
    assert "finished" not in page.text


def test_a_round_run_again_counts_once_as_last_written(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", done=3)
    with (run / "rounds.jsonl").open("a") as file:
        file.write(json.dumps(row_of(3, 12) | {"accuracy": 0.625}) + "\n")
    page = page_of(tmp_path, run)
    assert "3 of 12 rounds" in page.text
    assert page.result("ZeroFL")[1][1] == [0.625]


def test_a_run_without_a_round_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", done=0)
    page = page_of(tmp_path, run)
    assert "0 of 12 rounds" in page.text
    assert page.text.count("Nothing measured yet.") == 5
    (run / "rounds.jsonl").unlink()
    (run / "partition.json").unlink()
    assert "Who holds what" not in page_of(tmp_path, run).text


@pytest.mark.parametrize("lost", [None, "", "nan", float("nan"), True])
def test_values_that_are_not_numbers_are_left_out(tmp_path: Path, lost: Any) -> None:
    run = write_run(tmp_path / "run", done=1)
    names = [name for name, value in row_of(1, 12).items() if isinstance(value, int | float) and name != "round"]
    (run / "rounds.jsonl").write_text(json.dumps(row_of(1, 12) | dict.fromkeys(names, lost)) + "\n")
    page = page_of(tmp_path, run)
    assert page.text.count("Nothing measured yet.") == 5
    assert [text for text, _ in page.result("ZeroFL")[1:]] == ["–"] * 8


def test_numbers_that_nothing_measures_are_left_out(tmp_path: Path) -> None:
    for i, lost in enumerate((1e308, -1e308, 10**400, 1e-320, 5)):
        run = write_run(tmp_path / f"{i}", done=3)
        fields = ["clients", "refused"] + ["bytes_up", "bytes_dense_up", "seconds", "multiply_adds"] * (lost != 5)
        rows = [row | dict.fromkeys(fields, lost) for row in rows_in(run)]
        (run / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        cells = page_of(tmp_path, run).result("ZeroFL")
        assert cells[5][0] == "–"
        assert (cells[3][0] == cells[6][0] == cells[7][0] == "–") == (lost != 5)
        assert cells[1][1] == [rows[-1]["accuracy"]]


def test_an_upload_is_not_guessed_where_a_round_does_not_say_who_answered(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", done=3)
    rows = rows_in(run)
    rows[1]["clients"] = 5
    (run / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert page_of(tmp_path, run).result("ZeroFL")[5] == ("–", [])


@pytest.mark.parametrize("rounds", [10, 13, None, "12", [12]])
def test_a_summary_of_other_rounds_is_passed_over(tmp_path: Path, rounds: Any) -> None:
    run = write_run(tmp_path / "run")
    change(run / "summary.json", rounds=rounds, accuracy=0.125, bytes_up=1)
    page = page_of(tmp_path, run)
    rows = rows_in(run)
    assert page.result("ZeroFL")[1][1] == [rows[-1]["accuracy"]]
    assert page.result("ZeroFL")[3][1][0] == sum(row["bytes_up"] for row in rows)
    assert page.result("ZeroFL")[8] == ("–", [])


def test_one_round_and_missing_fields_still_make_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", done=1)
    bare = write_run(tmp_path / "bare", done=0)
    (bare / "rounds.jsonl").write_text('{"round": 1, "accuracy": 0.5}\n{"round": 2}\n')
    (bare / "run.json").write_text("{}")
    page = page_of(tmp_path, run, bare)
    assert "1 of 12 rounds" in page.text
    assert "2 of ? rounds" in page.text
    assert page.result("bare")[1] == ("50.0 %", [0.5])


def test_rounds_without_a_test_are_passed_over(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", done=5, every=2)
    page = page_of(tmp_path, run)
    assert page.result("ZeroFL")[1][1] == [rows_in(run)[3]["accuracy"]]


def test_settings_that_differ_come_first_and_the_rest_is_folded(tmp_path: Path) -> None:
    page = page_of(tmp_path, *(write_run(tmp_path / f"{lr}", lr=lr) for lr in (0.1, 0.2)))
    fields = [row for row in page.rows if row[0][0] in ("lr", "method.sparsity")]
    assert [[text for text, _ in row] for row in fields] == [["lr", "0.1", "0.2"], ["method.sparsity", "0.9"]]
    order = [tag for tag, attributes in page.tags if tag == "details" or attributes.get("class") == "differs"]
    assert order == ["tr", "details", "details"]
    assert not any("open" in details for details in page.named("details")[:1])
    assert "Example 2" in page.text
    assert "3c7402f" in page.text


def test_refused_updates_are_counted_by_reason(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", refuse=(2, 3, 7))
    assert "Refused updates" not in page_of(tmp_path, write_run(tmp_path / "fine")).text
    page = page_of(tmp_path, run)
    assert "3 refused" in page.text
    assert "3 × values that are not finite" in page.text


def test_runs_that_share_a_partition_share_its_map(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{i}", seed=i, alpha=alpha) for i, alpha in enumerate((1.0, 1.0, 0.1))]
    page = page_of(tmp_path, *runs)
    assert len(page.named("image")) == 2 * 2
    assert "digits, lda:1.0, seed 0, 1" in page.text
    assert "The clients of other seeds (1)" in page.text
    page = page_of(tmp_path, *runs, write_run(tmp_path / "other", alpha=0.5, lr=0.2, task={"partition": "lda:0.5"}))
    assert page.text.count("Of: partition lda:1.0") == page.text.count("Of: partition lda:0.5") == 1


def test_many_configurations_have_a_row_for_each_value_of_a_setting(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{lr}{b}", lr=lr, batch=b, rounds=2) for lr in (0.1, 0.2, 0.4) for b in (8, 16)]
    dense = {"kind": "FedAvg", "server": {"kind": "Average"}}
    runs += [write_run(tmp_path / f"dense{lr}", lr=lr, batch=8, rounds=2, method=dense) for lr in (0.1, 0.2)]
    page = page_of(tmp_path, *runs)
    rows = [[text for text, _ in row] for row in page.rows]
    assert ["batch", "16", "; ".join(f"ZeroFL, lr {lr}, batch 16" for lr in (0.1, 0.2, 0.4))] in rows
    assert ["8", "all others"] in rows
    assert ["method.sparsity", "0.9", "ZeroFL (all 6)"] in rows
    assert ["method.server.kind", "Average", "FedAvg (all 2)"] in rows
    many = [write_run(tmp_path / f"many{i}", lr=i / 100 + 0.01, rounds=2) for i in range(12)]
    assert "12 values from 0.01 to 0.12" in page_of(tmp_path, *many).text


@pytest.mark.parametrize(("clients", "columns"), [(5, 5), (200, 200), (201, 201), (3600, 400)])
def test_many_clients_are_sorted_by_main_class_and_gathered(clients: int, columns: int) -> None:
    counts = np.random.default_rng(0).integers(0, 50, (clients, 62)).astype(float)
    shown, name = gather_columns(counts)
    assert shown.shape == (columns, 62)
    np.testing.assert_allclose(shown.sum(0) * clients / columns, counts.sum(0))
    if clients > 200:
        assert "by main class" in name
    if columns == clients > 200:
        assert (np.diff(shown.argmax(1)) >= 0).all()


FILES = [(f"{name}.json", f"{name}.json") for name in ("run", "summary", "partition")]
FILES += [("rounds.jsonl", "rounds.jsonl line 1")]


def broken(tmp_path: Path, name: str, text: str) -> Path:
    run = write_run(tmp_path / "run")
    (run / name).write_text(text)
    return run


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("run.json", "{", "run.json"),
        ("run.json", "[]", "run.json"),
        ("summary.json", "", "summary.json"),
        ("rounds.jsonl", '{"round": 1}\nnot json\n{"round": 3}\n', "rounds.jsonl line 2"),
        ("partition.json", '{"classes": ["a"], "counts": [[1, 2]]}', "partition.json"),
        ("partition.json", '{"counts": [[1, 2]]}', "partition.json"),
        ("partition.json", '{"classes": ["a", "b"], "counts": [[1, 2], [1]]}', "partition.json"),
        ("partition.json", '{"classes": ["a"], "counts": [[-1]]}', "partition.json"),
        ("partition.json", '{"classes": ["a"], "counts": [[1e308], [1e308]]}', "partition.json"),
        ("partition.json", f'{{"classes": ["a"], "counts": [[1{"0" * 400}]]}}', "partition.json"),
        *((name, f'{{"a":{"[" * 60}{"]" * 60}}}\n', where) for name, where in FILES),
        *((name, f'{{"a":{"[" * 100_000}{"]" * 100_000}}}\n', where) for name, where in FILES),
        *((name, f'{{"a":1{"0" * 5000}}}\n', where) for name, where in FILES),
    ],
)
def test_a_broken_file_is_named_with_the_remedy(tmp_path: Path, name: str, text: str, where: str) -> None:
    run = broken(tmp_path, name, text)
    with pytest.raises(InputError, match=rf"{re.escape(str(run / where))}.*restore") as raised:
        report([run], tmp_path / "report.html")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "report.html").exists()


def test_what_is_not_a_run_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for folder in (tmp_path / "empty", tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(InputError, match=rf"{folder} is not a run directory .*fedsieve run"):
            report([folder], tmp_path / "report.html")
    with pytest.raises(InputError, match="no run directory given"):
        report([], tmp_path / "report.html")


@pytest.mark.parametrize("name", ["run.json", "rounds.jsonl", "summary.json", "partition.json"])
def test_a_directory_in_a_files_place_is_named(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run")
    (run / name).unlink()
    (run / name).mkdir()
    with pytest.raises(InputError, match=rf"{re.escape(str(run / name))} cannot be read \(Is a directory\)"):
        report([run], tmp_path / "report.html")
    (run / name).rmdir()
    os.mkfifo(run / name)  # which nobody ever writes to
    with pytest.raises(InputError, match=rf"{re.escape(str(run / name))} cannot be read \(Not a regular file\)"):
        report([run], tmp_path / "report.html")


def test_what_is_not_a_regular_file_is_not_written_over(tmp_path: Path) -> None:
    run, fifo, link = write_run(tmp_path / "run"), tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(fifo)
    link.symlink_to("/dev/null")
    for out in (fifo, link, Path("/dev/null")):
        with pytest.raises(InputError, match=f"{out} is not a regular file"):
            report([run], out)
    assert fifo.is_fifo()
    assert link.is_symlink()


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(InputError, match="cannot be written"):
        report([run], tmp_path / ("r" * 256))
    report([run], tmp_path / ("r" * 255))
    assert (tmp_path / ("r" * 255)).exists()


def test_a_place_that_cannot_take_the_page_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(InputError, match=rf"{tmp_path} is a directory: name a file"):
        report([run], tmp_path)
    with pytest.raises(InputError, match=rf"{tmp_path / 'absent'} is not a folder: create it"):
        report([run], tmp_path / "absent" / "report.html")


def test_a_page_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = write_run(tmp_path / "run"), tmp_path / "report.html"
    out.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InputError, match=r"report.html cannot be written \(No space left on device\)"):
        report([run], out)
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]


@pytest.mark.system
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_renders_the_page_and_asks_for_nothing(tmp_path: Path, width: int) -> None:
    runs = [write_run(tmp_path / f"{i}", seed=i, lr=0.1 + i, density=0.05 * 4**i) for i in range(3)]
    page_of(tmp_path, *runs)
    shot = tmp_path / "shot.png"
    said = in_browser(tmp_path / "report.html", f"--window-size={width},2400", f"--screenshot={shot}", "--dump-dom")
    assert "CONSOLE" not in said.stderr  # where the browser notes what the page's policy refused
    if said.stdout:
        assert len([svg for svg in Page(said.stdout).named("svg") if svg.get("role") == "img"]) == 7
        assert len(Page(said.stdout).named("button")) == 10  # made by the script, which the policy let run
    with Image.open(shot) as image:
        picture = np.asarray(image.convert("RGB"))
    assert picture.shape[1] == width
    for colour in ((0, 114, 178), (213, 94, 0), (0, 158, 115)):
        assert (picture == colour).all(2).sum() > 200


@pytest.mark.system
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_table_sorts_by_a_click_and_no_page_is_wider_than_a_phone(tmp_path: Path) -> None:
    tops = {"b10": 0.7, "b9": 0.9, "c": None, "a": 0.8}
    runs = []
    for name, top in tops.items():
        method = {"kind": name, "sparsity": 0.9, "a_rather_long_name_of_a_field": "a" * 60}
        for seed in range(2):
            runs.append(
                write_run(tmp_path / f"{name}-{seed}", seed=seed, method=method, rounds=3, done=3 if top else 0)
            )
            if top:
                change(runs[-1] / "summary.json", accuracy=top)
    page_of(tmp_path, *runs)
    page = tmp_path / "report.html"
    ask = """
    const heads = document.querySelectorAll("table.sorts")[0].tHead.rows[0].cells, found = [];
    const names = () => [...document.querySelectorAll("table.sorts")[0].tBodies[0].rows].map(
      (row) => row.querySelector(".named").textContent.trim()).join(" ");
    for (const i of [1, 1, 0, 0]) {
      heads[i].querySelector("button").click();
      found.push(names() + " " + heads[i].ariaSort);
    }
    document.querySelectorAll("details").forEach((one) => one.open = true);
    const frame = document.documentElement;
    document.title = JSON.stringify([found, frame.scrollWidth <= frame.clientWidth]);"""
    text = re.sub("<meta http-equiv[^>]*>", "", page.read_text())
    page.write_text(text.replace("</body>", f"<script>{ask}</script></body>"))
    found = re.search("<title>(.*?)</title>", in_browser(page, "--window-size=390,2400", "--dump-dom").stdout)
    assert found
    assert json.loads(found[1]) == [
        [
            "b9 a b10 c descending",
            "b10 a b9 c ascending",
            "a b9 b10 c ascending",
            "c b10 b9 a descending",
        ],
        True,
    ]


def in_browser(page: Path, *wanted: str) -> subprocess.CompletedProcess[str]:
    options = [*QUIET, f"--user-data-dir={page.parent / 'profile'}", *wanted, page.as_uri()]
    return subprocess.run([str(CHROMIUM), *options], capture_output=True, text=True, timeout=120, check=True)
