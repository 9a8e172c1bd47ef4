"""Where a run stands on an axis of density: at its method's target, or at what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fabricated import fabricate
from fedsieve.report.figures import paper_figure, write_figure
from fedsieve.runs.record import read_record
from fedsieve.types import InputError
from figure_runs import DENSE, accuracy, change_rows, close, flash, panels, zerofl
from report_pages import change


def own(field: str, value: Any, target: float | None = None, **about: Any) -> dict[str, Any]:
    """Return the arguments of a run whose method is not one of the project's."""
    about = {"class": "mine:Mine", "method": "mine", "target_density": target} | about
    return {"method": {"kind": "Mine", field: value}, "about": about, "rounds": 4}


def measured(folder: Path, density: float | None) -> Path:
    change_rows(folder, lambda row: row | {"density": density})
    change(folder / "summary.json", density=density)
    return folder


@pytest.mark.parametrize("field", ["density", "sparsity", "densities"])
def test_a_field_of_a_strangers_method_is_never_taken_for_its_density(tmp_path: Path, field: str) -> None:
    """It is of the clients, say; the models are dense, or as dense as was measured."""
    few, many = ([0.01], [0.5]) if field == "densities" else (0.01, 0.5)
    dense = measured(fabricate(tmp_path / "dense", **own(field, few)), 0.9993)
    cut = [measured(fabricate(tmp_path / f"{s}", seed=s, **own(field, many)), d) for s, d in ((0, 0.118), (1, 0.122))]
    folders = [dense, *cut, fabricate(tmp_path / "flash", flash(0.05), rounds=4)]
    sent, kept = panels("flash-1", folders)
    names = [f"mine, {field} {value}" for value in (few, many)]
    assert list(sent.lines) == [*names, "FLASH, d = 0.05"]
    close(kept.lines[names[0]], [0.05, 0.12], [accuracy([dense])[0]] * 2, [0, 0])
    assert kept.lines[names[0]].level
    mean, spread = accuracy(cut)
    close(kept.lines[names[1]], [0.12], [mean], [spread])
    caption = paper_figure("flash-1", [read_record(folder) for folder in folders]).full_caption
    assert "where it declares none, what was measured" in caption
    (panel,) = panels("sparsefedpp-1", folders)
    assert panel.x.steps == ("0.88", "0.95")
    assert list(panels("zerofl-1", folders)[0].lines) == [names[0], names[1], "95 % sparse"]
    assert list(panels("flash-1", [measured(cut[0], None), folders[-1]])[1].lines) == ["mine", "FLASH, d = 0.05"]


def test_a_seed_whose_target_is_not_known_stands_at_what_was_measured(tmp_path: Path) -> None:
    older = measured(fabricate(tmp_path / "0", flash(0.1), rounds=4, about={"target_density": None}), 0.2)
    folders = [older, fabricate(tmp_path / "1", flash(0.1), seed=1, rounds=4)]
    (panel,) = panels("sparsefedpp-1", folders)
    assert panel.x.steps == ("0.8", "0.9")
    assert sorted(line.x for line in panel.lines.values()) == [[0], [1]]


def test_a_method_that_declares_its_target_is_one_line_over_it(tmp_path: Path) -> None:
    folders = [
        fabricate(tmp_path / f"{keep}{s}", seed=s, **own("keep", keep, keep)) for keep in (0.1, 0.2) for s in (0, 1)
    ]
    other = fabricate(tmp_path / "other", **own("keep", 0.1, 0.1, **{"class": "mine:Other", "method": "other"}))
    inner = {"kind": "Private", "inner": {"kind": "PDST", "density": 0.1}, "noise": 0.25}
    private = [
        fabricate(
            tmp_path / f"p{d}", inner | {"inner": {"kind": "PDST", "density": d}}, rounds=4, about={"target_density": d}
        )
        for d in (0.1, 0.25)
    ]
    _, kept = panels("flash-1", [*folders, other, *private])
    assert {name: list(line.x) for name, line in kept.lines.items()} == {
        "mine": [0.1, 0.2],
        "other, d = 0.1": [0.1],
        "Private": [0.1, 0.25],
    }
    assert "measured" not in paper_figure("flash-1", [read_record(folder) for folder in folders]).full_caption


def test_a_level_has_a_length_where_all_runs_are_of_one_density_and_a_lone_line_one_label(tmp_path: Path) -> None:
    dense, lone = fabricate(tmp_path / "dense", DENSE, rounds=3), fabricate(tmp_path / "lone", flash(0.1), rounds=3)
    sent, kept = panels("flash-1", [dense, lone])
    assert list(kept.lines) == list(sent.lines) == ["FedAvg", "FLASH, d = 0.1"]
    assert [line.look for line in kept.lines.values()] == [0, 1]
    np.testing.assert_allclose(kept.lines["FedAvg"].x, [0.09, 0.11])
    (panel,) = panels("sparsefedpp-1", [dense, lone])
    np.testing.assert_allclose(panel.lines["FedAvg"].x, [-0.1, 0.1])


def test_r_mask_is_that_of_zerofl_alone(tmp_path: Path) -> None:
    stranger = fabricate(tmp_path / "own", **own("r_mask", 0.3, 0.1))
    namesake = fabricate(tmp_path / "name", zerofl(r_mask=0.3), rounds=4, about={"class": "mine:ZeroFL"})
    for folder in (stranger, namesake):
        with pytest.raises(InputError, match="name runs of zerofl"):
            write_figure("zerofl-4", [folder], tmp_path / "a.png")
    runs = [fabricate(tmp_path / f"{r}", zerofl(r_mask=r), rounds=4) for r in (0.1, 0.2)]
    (panel,) = panels("zerofl-4", [*runs, stranger, namesake])
    assert list(panel.lines["top weights"].x) == [0.1, 0.2]
    assert panel.lines["mine"].level
    assert panel.lines["ZeroFL"].level
