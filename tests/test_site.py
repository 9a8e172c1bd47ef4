"""The docs site: it builds without a warning, asks no other machine for anything, and has every setting."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(ROOT / "docs")
    import hooks

    text: str = hooks.settings_page()
    return text


def test_every_setting_has_a_meaning(page: str) -> None:
    rows = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in page.splitlines() if line[:3] == "| `"]
    assert len(rows) > 100
    assert not [row[0] for row in rows if not row[-1].strip()]


def test_what_can_be_set_is_on_the_page(page: str) -> None:
    from dataclasses import fields

    from fedsieve import Run, Task
    from fedsieve.methods import METHODS

    for field in (*fields(Run), *fields(Task)):
        assert re.search(rf"^\| `(task\.)?{field.name}` \|", page, re.M), field.name
    for name in METHODS:
        assert f"\n### {name}\n" in page
    for setting in ("bound.times", "mean.share", "method.server.eta", "method.r_mask"):
        assert f"\n| `{setting}` |" in page
    for command in ("run", "sweep", "export", "bench step", "flower app"):
        assert f"\n### fedsieve {command}\n" in page


def test_every_published_row_is_on_a_page(page: str) -> None:
    import hooks  # by the fixture's path

    from fedsieve.recipes.papers import published

    text = hooks.papers_page()
    assert all(f"\n| {row.name} | {row.printed} | `{row.command}` |\n" in text for row in published())
    assert "\n| batch | not printed: 16 |\n" in text
    assert "\n| reading | test accuracy, in round 200 |\n" in text


def test_every_table_of_the_papers_has_a_page_that_the_navigation_names(page: str) -> None:
    import hooks  # by the fixture's path

    pages = hooks.reproduction_pages()
    assert [*pages] == re.findall(r"\b(reproductions/\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert len(pages) == 10
    assert '<th scope="col">NST Acc %</th>' in pages["reproductions/flash_table2.md"]
    assert all(f"]({path.rpartition('/')[2]})" in pages["reproductions/index.md"] for path in [*pages][1:])
    assert "](flash_figure2_mnist.svg)" in (text := pages["reproductions/flash_figure2_mnist.md"])
    assert f"2 of {2 + text.count('(missing)')} cells" in text


def test_a_figure_of_committed_results_is_drawn_of_their_numbers(page: str) -> None:
    import hooks  # by the fixture's path

    from fedsieve.recipes.papers.parts import find_part
    from fedsieve.report.figures import paper_figure
    from fedsieve.report.paper_tables import figure_records

    drawings = hooks.reproduction_drawings()
    assert [*drawings] == ["reproductions/flash_figure2_mnist.svg"]
    assert all(drawing.startswith(b"<?xml") and len(drawing) < 200_000 for drawing in drawings.values())
    part = find_part("flash", "figure2_mnist")
    cells = figure_records(ROOT / "reproductions")[part]
    figure = paper_figure("flash-2", [record for kept in cells.values() for record in kept])
    for density, number in (("0.1", 9), ("0.05", 12)):  # one seed each: the lines are its columns
        path = ROOT / f"reproductions/flash/results/flash_table2-{number}-seed0.json"
        kept = json.loads(path.read_text())["columns"]
        accuracy, mismatch = (plot.lines[f"d = {density}"] for plot in figure.plots)
        tested = [(t, 100 * v) for t, v in zip(kept["round"], kept["accuracy"], strict=True) if v is not None]
        assert [*zip(accuracy.x, accuracy.y, strict=True)] == tested
        assert [*mismatch.y] == [100 * v for v in kept["mismatch"] if v is not None]


def test_every_variable_of_the_environment_is_on_the_page(page: str) -> None:
    source = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    read = {*re.findall(r"\bFEDSIEVE_[A-Z_]+\b", source)} - {
        "FEDSIEVE_ENDED"
    }  # what a run's own processes tell another
    assert read == {*re.findall(r"^\| `(FEDSIEVE_[A-Z_]+)` \|", page, re.M)}


@pytest.mark.system
def test_the_site_builds_strictly_and_asks_nobody(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the docs' tools are not installed: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    html = [path.read_text() for path in (tmp_path / "site").rglob("*.html")]
    assert len(html) > 25
    loaded = re.compile(r'<(?:script|img)[^>]+src="?https?:|<link[^>]+rel="?(?:stylesheet|preconnect)[^>]+https?:')
    assert not [found for text in html for found in loaded.findall(text)]
    assert "lr_end" in (tmp_path / "site/reference/settings.html").read_text()
    assert "97.57 ± 0.11" in (tmp_path / "site/reproductions/flash_table2.html").read_text()
