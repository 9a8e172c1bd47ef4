"""The report page in a browser: nothing is asked for, tables sort, phones show it whole."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from report_pages import Page, change, page_of, write_run

CHROMIUM = shutil.which("chromium")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"]


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
        assert len([svg for svg in Page(said.stdout).named("svg") if svg.get("role") == "img"]) == 9
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
