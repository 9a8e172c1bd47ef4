"""The report page: complete, the same every time, closed to the outside."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsieve.report import report
from fedsieve.report.configurations import group_configurations
from fedsieve.report.figures import paper_figures
from fedsieve.report.page import swatch
from fedsieve.report.partitions import gather_columns
from fedsieve.runs.record import read_record
from report_pages import CLASSES, change, page_of, row_of, rows_in, write_run


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


def test_hashes_are_short_where_runs_are_listed(tmp_path: Path) -> None:
    mine = {"dataset": f"mine {'0a1b2c3d' * 8}"}
    text = page_of(tmp_path, *(write_run(tmp_path / f"run-{seed}", seed=seed, task=mine) for seed in (0, 1))).text
    assert "2 runs of 1 configuration of ZeroFL on mine 0a1b2c3d\n" in text
    assert "mine 0a1b2c3d, lda:1.0" in text


@pytest.mark.slow
def test_a_directory_given_twice_counts_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    report([run], tmp_path / "once.html")
    report([run, run], tmp_path / "twice.html")
    assert (tmp_path / "once.html").read_bytes() == (tmp_path / "twice.html").read_bytes()


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
    assert [line.partition(".")[0] for line in says[:6]] == [
        "Accuracy over rounds",
        "Accuracy over bytes sent",
        "Density over rounds",
        "Bytes up in a round",
        "Bytes down in a round",
        "loss over rounds",
    ]
    losses = [rows_in(run)[place]["loss"] for place in (0, -1)]
    assert f"ZeroFL: {losses[0]:.4g} to {losses[1]:.4g}" in says[5]
    ends = [100 * rows_in(run)[place]["accuracy"] for place in (0, -1)]
    assert f"ZeroFL: {ends[0]:.4g} to {ends[1]:.4g}" in says[0]
    assert "20 clients" in says[6]
    assert all(svg.get("role") == "img" or svg.get("aria-hidden") == "true" for svg in page.named("svg"))


def test_looks_differ_by_colour_dash_and_marker_together() -> None:
    samples = [re.sub(r'"?#?\bkey-[^"]*"', "", swatch("key", look)) for look in range(49)]
    assert len(set(samples)) == 49
    shapes = [re.sub(r"var\(--\w+\)", "", sample) for sample in samples]
    assert len(set(shapes[:7])) == 7
    assert all(len({shapes[i + 7 * k] for k in range(4)}) == 4 for i in range(7))
    assert swatch("key", 3) == swatch("key", 3)


@pytest.mark.slow
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


def test_settings_that_differ_come_first_and_the_rest_is_folded(tmp_path: Path) -> None:
    page = page_of(tmp_path, *(write_run(tmp_path / f"{lr}", lr=lr) for lr in (0.1, 0.2)))
    fields = [row for row in page.rows if row[0][0] in ("lr", "method.sparsity")]
    assert [[text for text, _ in row] for row in fields] == [["lr", "0.1", "0.2"], ["method.sparsity", "0.9"]]
    order = [tag for tag, attributes in page.tags if tag == "details" or attributes.get("class") == "differs"]
    assert order == ["tr", "details", "details"]
    assert not any("open" in details for details in page.named("details")[:1])
    assert "Example 2" in page.text
    assert "3c7402f" in page.text


@pytest.mark.slow
def test_refused_updates_are_counted_by_reason(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", refuse=(2, 3, 7))
    assert "Refused updates" not in page_of(tmp_path, write_run(tmp_path / "fine")).text
    page = page_of(tmp_path, run)
    assert "3 refused" in page.text
    assert "3 × values that are not finite" in page.text
    rows = rows_in(run)
    rows[0]["refused"] = [{"client": 1, "reason": "too long"}]
    (run / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = page_of(tmp_path, run).text
    assert said.index("3 × values that are not finite") < said.index("1 × too long")


def test_a_model_of_zeros_has_a_plot_of_its_density_all_the_same(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rounds=3)
    rows = [row | {"density": row["density"] * (row["round"] > 1)} for row in rows_in(run)]
    (run / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    says = [svg.get("aria-label") or "" for svg in page_of(tmp_path, run).named("svg") if svg.get("role") == "img"]
    assert any(line.startswith("Density over rounds. density, %, first to last: ZeroFL: 0 to") for line in says)


@pytest.mark.slow
def test_runs_that_share_a_partition_share_its_map(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{i}", seed=i, alpha=alpha) for i, alpha in enumerate((1.0, 1.0, 0.1))]
    page = page_of(tmp_path, *runs)
    assert len(page.named("image")) == 2 * 2
    assert "digits, lda:1.0, seed 0, 1" in page.text
    assert "The clients of other seeds (1)" in page.text
    page = page_of(tmp_path, *runs, write_run(tmp_path / "other", alpha=0.5, lr=0.2, task={"partition": "lda:0.5"}))
    assert page.text.count("Of: partition lda:1.0") == page.text.count("Of: partition lda:0.5") == 1


@pytest.mark.slow
def test_sizes_are_shown_where_they_differ_and_alone_where_there_are_no_classes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    change(run / "partition.json", classes=["cat", "dog"], counts=[[30, 0], [12, 20]])
    assert len([label for label in _labels(page_of(tmp_path, run)) if label.startswith("digits, lda:1.0")]) == 1
    change(run / "partition.json", classes=["cat", "dog"], counts=[[30, 0], [1, 20]])
    shown = [label for label in _labels(page_of(tmp_path, run)) if label.startswith("digits, lda:1.0")]
    assert [label.partition(": ")[2][:5] for label in shown] == ["51 ex", "sizes"]
    change(run / "partition.json", classes=[], counts=[[30], [30]])
    page = page_of(tmp_path, run)
    assert "60 examples on 2 clients. A client holds 30 examples." in page.text
    assert len([label for label in _labels(page) if label.startswith("digits, lda:1.0")]) == 1
    assert not page.named("image")


def _labels(page: Any) -> list[str]:
    return [svg.get("aria-label") or "" for svg in page.named("svg") if svg.get("role") == "img"]


@pytest.mark.slow
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
