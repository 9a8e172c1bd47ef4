"""The papers' figures as files: drawn whole, the same every time, and every mistake named."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from fabricated import fabricate
from fedsieve.report import report
from fedsieve.report.configurations import deduplicate
from fedsieve.report.figures import (
    FIGURES,
    PAPER,
    draw_figure,
    draw_records,
    paper_figure,
    paper_figures,
    write_figure,
)
from fedsieve.report.figures.papers import ZEROFL
from fedsieve.runs.record import RunRecord, read_record
from fedsieve.runs.reproduction.results import read_result
from fedsieve.types import InputError
from figure_runs import DENSE, every_figure, flash, panels, zerofl


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "rounds", "done"), [(3, 22, None), (2, 22, 15), (1, 1, None)])
def test_every_figure_draws(tmp_path: Path, seeds: int, rounds: int, done: int | None) -> None:
    made = every_figure(tmp_path, seeds, rounds, done)
    if rounds == 1:
        with pytest.raises(InputError, match="masks in two rounds"):
            write_figure("flash-2", made.pop("flash-2"), tmp_path / "flash-2.png")
    for name, folders in made.items():
        write_figure(name, folders, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width == round(300 * (3.4 if name in ("zerofl-4", "sparsefedpp-1") else 7.0))
            assert len(image.convert("RGB").getcolors(10**6) or []) > 10


@pytest.mark.slow
def test_kept_results_draw_what_their_runs_do(tmp_path: Path) -> None:
    for name, folders in every_figure(tmp_path, rounds=3).items():
        records = [kept(folder) for folder in folders]
        if name == "zerofl-3":
            with pytest.raises(InputError, match=r"0\.json holds no masks: name the run's directory"):
                draw_records(name, records, tmp_path / "a.svg")
            continue
        draw_records(name, records, tmp_path / "a.svg")
        write_figure(name, folders, tmp_path / "b.svg")
        assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes(), name
    with pytest.raises(InputError, match="flash-1 shows no run yet"):
        draw_records("flash-1", [], tmp_path / "a.svg")


def kept(folder: Path) -> RunRecord:
    """Return the results file of a run, read back."""
    run = read_record(folder)
    columns = {name: [row.get(name) for row in run.rows] for name in run.rows[0]}
    path = folder.with_suffix(".json")
    manifest = {"measure": []} | run.manifest
    path.write_text(json.dumps({"run": manifest, "summary": run.summary, "columns": columns}))
    record = read_result(path)
    assert record is not None
    return record


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["png", "pdf", "svg", "PDF"])
def test_the_same_runs_give_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    starts = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
    made = every_figure(tmp_path)
    for name in FIGURES if suffix == "svg" else ("zerofl-1", "zerofl-3", "flash-1"):  # which differ in how they draw
        for place in ("a", "b"):
            write_figure(name, made[name], tmp_path / f"{place}.{suffix}")
        content = (tmp_path / f"a.{suffix}").read_bytes()
        assert content == (tmp_path / f"b.{suffix}").read_bytes()
        assert content.startswith(starts[suffix.lower()])
        assert b"Type 3" not in content
        if suffix == "pdf":
            assert b"/FontFile2" in content
        if suffix == "svg":
            assert b"<text" not in content


def test_a_row_that_is_not_full_leaves_its_place_empty(tmp_path: Path) -> None:
    masks = (0.0, 0.1, 0.2, 0.3)
    runs = [read_record(fabricate(tmp_path / f"{r}", zerofl(r_mask=r), rounds=3, measure=True)) for r in masks]
    assert len(draw_figure(paper_figure("zerofl-2", runs)).axes) == 4
    assert len(draw_figure(paper_figure("zerofl-3", runs[:1], ("conv1", "fc1"))).axes) == 2


def test_the_axes_hold_the_numbers_and_the_legend_stands_outside(tmp_path: Path) -> None:
    runs = [read_record(folder) for folder in every_figure(tmp_path, seeds=3)["zerofl-1"]]
    made = paper_figure("zerofl-1", runs)
    with mpl.rc_context(PAPER):
        drawn = draw_figure(made)
        drawn.draw_without_rendering()
        assert drawn.get_figwidth() == 7.0
        (legend,) = drawn.legends
        box = legend.get_window_extent()
        for axes, panel in zip(drawn.axes, made.plots, strict=True):
            for line, data in zip(axes.lines, panel.lines.values(), strict=True):
                np.testing.assert_array_equal(line.get_xydata(), np.stack([data.x, data.y], 1))
            assert box.y1 <= axes.get_tightbbox().y0 + 1
        assert [text.get_text() for text in legend.get_texts()] == ["dense", "90 % sparse", "95 % sparse"]
        assert {text.get_fontsize() for text in legend.get_texts()} == {8}
        looks = [(to_hex(line.get_color()), line.get_marker()) for line in drawn.axes[0].lines]
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == 3


@pytest.mark.slow
def test_nothing_reaches_beyond_the_paper(tmp_path: Path) -> None:
    for name, folders in every_figure(tmp_path, seeds=2).items():
        with mpl.rc_context(PAPER):
            drawn = draw_figure(paper_figure(name, [read_record(folder) for folder in folders]))
            drawn.draw_without_rendering()
            tight, size = drawn.get_tightbbox(), drawn.get_size_inches()
        assert tight.x0 >= -0.01, name
        assert tight.y0 >= -0.01, name
        assert tight.x1 <= size[0] + 0.01, name
        assert tight.y1 <= size[1] + 0.01, name


@pytest.mark.parametrize("name", ["zerofl-2", "zerofl-3", "flash-2"])
def test_measures_that_are_missing_are_named_with_the_way_to_get_them(tmp_path: Path, name: str) -> None:
    run = fabricate(tmp_path / "run", zerofl(), rounds=3)
    with pytest.raises(InputError, match="--measure masks"):
        write_figure(name, [run], tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(("name", "said"), [("zerofl-4", "no run given has an r_mask"), ("sparsefedpp-1", "sparsity")])
def test_settings_that_are_missing_are_named(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        write_figure(name, [fabricate(tmp_path / "run", DENSE, rounds=3)], tmp_path / "out.png")


@pytest.mark.parametrize("name", ["zerofl-1", "zerofl-4", "flash-1", "sparsefedpp-1"])
def test_a_run_without_a_test_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="no run given has a tested round yet"):
        write_figure(name, [fabricate(tmp_path / "run", zerofl(), rounds=3, done=0)], tmp_path / "out.png")


def test_mistakes_are_named_with_the_remedy(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", zerofl(), rounds=3)
    for args, said in (
        (("zerofl-9", [run], tmp_path / "a.png"), "unknown figure 'zerofl-9'; the figures are zerofl-1, zerofl-2"),
        (("zerofl-1", [run], tmp_path / "a.jpg"), "a.jpg does not end in .png, .pdf or .svg"),
        (("zerofl-1", [run], tmp_path / "a"), "does not end in"),
        (("zerofl-1", [], tmp_path / "a.png"), "no run directory given"),
        (("zerofl-1", [run], tmp_path / "absent/a.png"), "absent is not a folder: create it"),
        (("zerofl-1", [tmp_path], tmp_path / "a.png"), "is not a run directory"),
        (("zerofl-1", [run], tmp_path / "a.png", ["conv1"]), "zerofl-1 has no layers to choose: drop --layers"),
    ):
        with pytest.raises(InputError, match=re.escape(said)) as raised:
            write_figure(*args)
        assert "\n" not in str(raised.value)
    (tmp_path / "dir.png").mkdir()
    with pytest.raises(InputError, match="is a directory: name a file"):
        write_figure("zerofl-1", [run], tmp_path / "dir.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dir.png", "run"]


def test_one_run_given_twice_is_no_second_seed(tmp_path: Path) -> None:
    run, out = fabricate(tmp_path / "run", zerofl(), rounds=3), tmp_path / "a.png"
    write_figure("zerofl-1", [run, run], out)
    shutil.copytree(run, tmp_path / "copy")
    alone = out.read_bytes()
    with pytest.warns(UserWarning, match=r"one counts .*: .*/copy, not .*/run$"):
        write_figure("zerofl-1", [run, tmp_path / "copy"], out)
    assert out.read_bytes() == alone


def test_of_runs_with_the_same_settings_the_newest_finished_counts(tmp_path: Path) -> None:
    def started(day: int) -> dict[str, str]:
        return {"started": f"2026-03-{day:02d}T09:30:00+00:00"}

    def taken(*folders: Path) -> list[str]:
        with pytest.warns(UserWarning, match="one counts") as said:
            found = deduplicate([read_record(folder) for folder in folders])
        assert len(said) == 1
        assert "\n" not in str(said[0].message)
        return [run.folder.name for run in found]

    old = fabricate(tmp_path / "old", zerofl(), rounds=6, about=started(1))
    new = fabricate(tmp_path / "new", zerofl(), rounds=6, about=started(2))
    going = fabricate(tmp_path / "going", zerofl(), rounds=6, done=4, about=started(3))
    begun = fabricate(tmp_path / "begun", zerofl(), rounds=6, done=1, about=started(4))
    other = fabricate(tmp_path / "other", zerofl(), seed=1, rounds=6, about={"started": 5})
    assert taken(new, old, going, other) == ["new", "other"]
    assert taken(begun, going) == ["going"]
    measured = fabricate(tmp_path / "measured", flash(0.1), rounds=6, measure=True, about=started(1))
    fabricate(tmp_path / "plain", flash(0.1), rounds=6, about=started(2))
    with pytest.warns(UserWarning, match=f"{measured}, not"):
        write_figure("flash-2", [measured, tmp_path / "plain"], tmp_path / "a.png")
    engines = [fabricate(tmp_path / e, zerofl(), rounds=6, about={"engine": e}) for e in ("local", "pool:2")]
    kernels = fabricate(tmp_path / "kernels", zerofl(), rounds=6, about={"kernels": "sparse", "engine": "local"})
    (panel,) = panels("zerofl-1", [*engines, kernels])
    told = ("engine local", "engine pool:2", "engine local, kernels sparse")
    assert list(panel.lines) == [f"90 % sparse, {x}" for x in told]


@pytest.mark.slow
def test_names_of_strangers_are_text_in_every_format(tmp_path: Path) -> None:
    bad = '<script>$\\frac{$ \u6f22 & "q"'
    layers = {bad: 30, "b": 30}
    more: dict[str, Any] = {"rounds": 3, "measure": True, "layers": layers, "about": {"class": ZEROFL, "method": bad}}
    run = fabricate(tmp_path / "run", zerofl() | {"kind": bad}, **more)
    other = fabricate(tmp_path / "other", zerofl(0.8) | {"kind": bad}, **more)
    for suffix in ("png", "pdf", "svg"):
        for name in FIGURES:
            write_figure(name, [run, other], tmp_path / f"a.{suffix}")
    report([run, other], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<script") == 1
    assert "&lt;script&gt;" in page


@pytest.mark.slow
def test_the_page_shows_the_figures_that_its_runs_have_data_for(tmp_path: Path) -> None:
    made = every_figure(tmp_path, seeds=1, rounds=5)
    shown = {name: [one.name for one in paper_figures([read_record(folder) for folder in made[name]])] for name in made}
    assert all(name in shown[name] for name in FIGURES)
    assert shown["zerofl-3"] == ["zerofl-2", "zerofl-3", "flash-2"]
    assert shown["zerofl-4"] == ["zerofl-1", "zerofl-4"]
    assert paper_figures([read_record(made["zerofl-1"][0])]) == []
    report([made["zerofl-1"][0]], tmp_path / "plain.html")
    assert "papers’ figures" not in (tmp_path / "plain.html").read_text()
    with pytest.warns(UserWarning, match="one counts"):
        report(list(chain(*made.values())), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for title in (
        "ZeroFL, Fig. 1",
        "ZeroFL, Fig. 2",
        "ZeroFL, Fig. 3",
        "ZeroFL, Fig. 4",
        "FLASH, Fig. 1",
        "FLASH, Fig. 2",
    ):
        assert f"<h3>{title}" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', page)) <= set(ids)
    assert not re.search(r"https?://|<script.*<script|<text[^>]*font-family", page, re.S)
    assert statistics.median(len(title) for title in re.findall('aria-label="([^"]*)"', page)) > 40


def test_the_command_draws_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from fedsieve.cli import app

    run = fabricate(tmp_path / "run", zerofl(), rounds=3, measure=True)
    monkeypatch.chdir(tmp_path)
    for words, out in (
        (["zerofl-3", str(run), "-o", "a.svg", "--layers", "fc1, conv1"], "a.svg"),
        (["zerofl-1", str(run)], "zerofl-1.pdf"),
    ):
        done = CliRunner().invoke(app, ["figure", *words])
        assert done.output == f"wrote {out}\n"
        assert (tmp_path / out).stat().st_size > 1000
