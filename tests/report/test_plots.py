"""The papers' figures: the numbers that are drawn, what is refused, and files that come out the same every time."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from fabricated import LAYERS, fabricate, write_masks
from fedsieve.report import report
from fedsieve.report.configurations import deduplicate
from fedsieve.report.figures import FIGURES, paper_figure, paper_figures, write_figure
from fedsieve.report.figures.mask_files import (
    LENGTH,
    STRETCHES,
    mask_sizes,
    masks_at,
    recorded_rounds,
    sampled_positions,
)
from fedsieve.report.figures.paper import draw_figure
from fedsieve.report.figures.papers import ZEROFL
from fedsieve.report.plots import Line, LinePlot
from fedsieve.report.style import PAPER
from fedsieve.runs.record import read_record
from fedsieve.types import InputError


def zerofl(sparsity: float = 0.9, r_mask: float = 0.1, upload: str = "top_weights") -> dict[str, Any]:
    return {"kind": "ZeroFL", "sparsity": sparsity, "r_mask": r_mask, "upload": upload}


def flash(density: float) -> dict[str, Any]:
    return {"kind": "FLASH", "density": density}


DENSE = {"kind": "FedAvg", "server": {"kind": "Average"}}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def change_rows(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    (folder / "rounds.jsonl").write_text("".join(json.dumps(change(row)) + "\n" for row in rows_of(folder)))


def panels(name: str, folders: list[Path], layers: tuple[str, ...] = ()) -> tuple[LinePlot, ...]:
    plots = paper_figure(name, [read_record(folder) for folder in folders], layers).plots
    assert all(isinstance(plot, LinePlot) for plot in plots)
    return plots  # type: ignore[return-value]


def accuracy(folders: list[Path], last: int = -1) -> tuple[float, float]:
    """Return mean and standard deviation of the accuracies at the end, by arithmetic of its own."""
    values = np.array([100 * rows_of(folder)[last]["accuracy"] for folder in folders])
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0


def close(line: Line, x: list[float], y: list[float], spread: list[float]) -> None:
    np.testing.assert_allclose(line.x, x)
    np.testing.assert_allclose(line.y, y)
    np.testing.assert_allclose(line.spread, spread, atol=1e-9)


def every_figure(tmp_path: Path, seeds: int = 2, rounds: int = 22, done: int | None = None) -> dict[str, list[Path]]:
    """Return runs for each of the figures."""
    made: dict[str, list[Path]] = {}

    def more(name: str, method: dict[str, Any], seed: int = 0, **spec: Any) -> None:
        folder = tmp_path / name / f"{len(made.get(name, []))}"
        made.setdefault(name, []).append(fabricate(folder, method, seed=seed, rounds=rounds, done=done, **spec))

    for seed in range(seeds):
        for method in (DENSE, zerofl(0.9), zerofl(0.95)):
            more("zerofl-1", method, seed, clients=1)
            more("zerofl-1", method, seed, partition="lda:1000")
            more("zerofl-1", method, seed)
        for r_mask in (0.0, 0.1, 0.2):
            more("zerofl-4", zerofl(r_mask=r_mask), seed)
            more("zerofl-4", zerofl(r_mask=r_mask, upload="top_diff"), seed)
        for method in (DENSE, flash(0.05), flash(0.1), zerofl(0.95), zerofl(0.9)):
            more("flash-1", method, seed)
            more("sparsefedpp-1", method, seed)
        for clients in (1, 20):
            more("flash-2", flash(0.05), seed, measure=True, clients=clients)
            more("flash-2", flash(0.1), seed, measure=True, clients=clients)
        more("zerofl-2", zerofl(r_mask=0.0), seed, measure=True)
        more("zerofl-2", zerofl(r_mask=0.2), seed, measure=True)
    more("zerofl-3", zerofl(), measure=True)
    return made


@pytest.mark.parametrize(("seeds", "rounds", "done"), [(1, 22, None), (3, 22, None), (2, 22, 15), (1, 1, None)])
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


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg", "PDF"])
def test_the_same_runs_give_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    starts = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
    for name, folders in every_figure(tmp_path).items():
        for place in ("a", "b"):
            write_figure(name, folders, tmp_path / f"{place}.{suffix}")
        content = (tmp_path / f"a.{suffix}").read_bytes()
        assert content == (tmp_path / f"b.{suffix}").read_bytes()
        assert content.startswith(starts[suffix.lower()])
        assert b"Type 3" not in content
        if suffix == "pdf":
            assert b"/FontFile2" in content
        if suffix == "svg":
            assert b"<text" not in content


def test_zerofl_1_averages_seeds_and_sorts_runs_into_panels(tmp_path: Path) -> None:
    folders = every_figure(tmp_path, seeds=3)["zerofl-1"]
    shown = panels("zerofl-1", folders)
    assert [panel.title for panel in shown] == ["centralised", "FL, IID", "FL, non-IID"]
    for i, panel in enumerate(shown):
        assert list(panel.lines) == ["dense", "90 % sparse", "95 % sparse"]
        assert [line.look for line in panel.lines.values()] == [0, 1, 2]
        for k, line in enumerate(panel.lines.values()):
            runs = [folders[9 * seed + 3 * k + i] for seed in range(3)]
            ends = [accuracy(runs, t) for t in range(22)]
            close(line, list(range(1, 23)), [mean for mean, _ in ends], [spread for _, spread in ends])


@pytest.mark.parametrize(
    ("spec", "title"),
    [
        ({"clients": 1, "partition": "iid"}, "centralised"),
        ({"partition": "iid"}, "FL, IID"),
        ({"partition": "lda:100"}, "FL, IID"),
        ({"partition": "lda:99.9"}, "FL, non-IID"),
        ({"partition": "lda:nonsense"}, "FL, non-IID"),
        ({"partition": "group"}, "FL, non-IID"),
    ],
)
def test_the_setting_follows_from_clients_and_partition(tmp_path: Path, spec: dict[str, Any], title: str) -> None:
    (panel,) = panels("zerofl-1", [fabricate(tmp_path / "run", zerofl(), rounds=3, **spec)])
    assert panel.title == title


def test_runs_that_differ_in_more_than_the_seed_are_told_apart(tmp_path: Path) -> None:
    folders = [fabricate(tmp_path / f"{r}{s}", zerofl(r_mask=r), seed=s, rounds=3) for r in (0.0, 0.2) for s in (0, 1)]
    (panel,) = panels("zerofl-1", folders)
    assert list(panel.lines) == ["90 % sparse, r_mask 0.0", "90 % sparse, r_mask 0.2"]
    adam = fabricate(tmp_path / "adam", DENSE | {"server": {"kind": "Adam"}}, rounds=3)
    plain = fabricate(tmp_path / "plain", DENSE, rounds=3)
    (panel,) = panels("zerofl-1", [adam, plain])
    assert list(panel.lines) == ["dense, server Adam", "dense, server Average"]
    (panel,) = panels("zerofl-1", [*folders, fabricate(tmp_path / "flash", flash(0.1), rounds=3)])
    assert [*panel.lines][1:] == ["90 % sparse, ZeroFL, r_mask 0.2", "90 % sparse, FLASH"]


def test_an_unfinished_seed_ends_the_mean_where_it_ends_itself(tmp_path: Path) -> None:
    folders = [fabricate(tmp_path / f"{s}", zerofl(), seed=s, rounds=10, done=(10, 4, 0)[s]) for s in range(3)]
    (panel,) = panels("zerofl-1", folders)
    (line,) = panel.lines.values()
    both = [accuracy(folders[:2], t) for t in range(4)]
    close(line, [1, 2, 3, 4], [mean for mean, _ in both], [spread for _, spread in both])
    alone = panels("zerofl-1", folders[1:2])[0].lines["90 % sparse"]
    assert list(alone.x) == [1, 2, 3, 4]


def test_rounds_without_a_test_are_left_out(tmp_path: Path) -> None:
    (panel,) = panels("zerofl-1", [fabricate(tmp_path / "run", zerofl(), rounds=25, every=10)])
    assert list(panel.lines["90 % sparse"].x) == [10, 20, 25]


def test_a_warm_up_is_drawn_at_zero_and_its_bytes_count(tmp_path: Path) -> None:
    folder = fabricate(tmp_path / "run", flash(0.1), rounds=5, warm_up=True)
    rows = rows_of(folder)
    assert list(panels("zerofl-1", [folder])[0].lines["90 % sparse"].x) == [0, 1, 2, 3, 4, 5]
    sent, _ = panels("flash-1", [folder])
    total = np.cumsum([row["bytes_up"] + row["bytes_down"] for row in rows]) / 1e6
    close(sent.lines["FLASH, d = 0.1"], list(total), [100 * row["accuracy"] for row in rows], [0] * 6)


def test_zerofl_2_shows_every_layer_of_every_run(tmp_path: Path) -> None:
    folders = every_figure(tmp_path, seeds=3)["zerofl-2"]
    shown = panels("zerofl-2", folders)
    assert [panel.title for panel in shown] == ["ZeroFL, r_mask 0.0", "ZeroFL, r_mask 0.2"]
    for i, panel in enumerate(shown):
        assert list(panel.lines) == ["conv1", "conv2", "fc1"]
        rows = [rows_of(folder) for folder in folders[i::2]]
        for layer, line in panel.lines.items():
            ratio = 100 * np.array([[row["layers"][f"{layer}.weight"] for row in one] for one in rows])
            close(line, list(range(1, 23)), list(ratio.mean(0)), list(ratio.std(0, ddof=1)))
    (few, _) = panels("zerofl-2", folders, ("fc1", "conv1.weight"))
    assert list(few.lines) == ["conv1", "fc1"]


def test_a_row_that_is_not_full_leaves_its_place_empty(tmp_path: Path) -> None:
    masks = (0.0, 0.1, 0.2, 0.3)
    runs = [read_record(fabricate(tmp_path / f"{r}", zerofl(r_mask=r), rounds=3, measure=True)) for r in masks]
    assert len(draw_figure(paper_figure("zerofl-2", runs)).axes) == 4
    assert len(draw_figure(paper_figure("zerofl-3", runs[:1], ("conv1", "fc1"))).axes) == 2


def test_zerofl_3_shows_the_recorded_positions(tmp_path: Path) -> None:
    folder = fabricate(tmp_path / "run", zerofl(), rounds=45, measure=True)
    maps = paper_figure("zerofl-3", [read_record(folder)]).plots
    assert [one.title for one in maps] == ["conv1", "conv2", "fc1"]
    small, _, large = maps
    assert small.columns == ("1", "20", "40", "45")
    assert small.y.name == "position (all 100)"
    assert large.y.name == f"position ({STRETCHES * LENGTH} of 37 k)"
    files = recorded_rounds(read_record(folder))
    for bits, layer in ((small, "conv1.weight"), (large, "fc1.weight")):
        assert bits.present.shape == (len(sampled_positions(LAYERS[layer])), 4)
        np.testing.assert_array_equal(bits.present, masks_at(files, layer, LAYERS[layer]))


def test_packed_bits_are_read_in_their_order(tmp_path: Path) -> None:
    folder = fabricate(tmp_path / "run", zerofl(), rounds=1, measure=True)
    support = np.arange(LAYERS["fc1.weight"]) % 3 == 0
    write_masks(folder / "masks/000001.safetensors", {"fc1.weight": support})
    (one,) = paper_figure("zerofl-3", [read_record(folder)]).plots
    np.testing.assert_array_equal(one.present[:, 0], support[sampled_positions(len(support))])


@pytest.mark.parametrize("numel", [1, 144, 145, 1728, 36_864, 2_359_296])
def test_shown_positions_are_whole_stretches_from_first_to_last(numel: int) -> None:
    positions = sampled_positions(numel)
    assert positions[0] == 0
    assert positions[-1] == numel - 1
    assert (np.diff(positions) > 0).all() or numel == 145
    assert len(positions) == min(numel, STRETCHES * LENGTH)
    if numel > 1728:
        assert (np.diff(positions.reshape(STRETCHES, LENGTH)) == 1).all()
        assert np.ptp(np.diff(positions[::LENGTH])) <= 1
        assert set(positions % 9) == set(range(9))


def test_up_to_six_layers_are_chosen_evenly_or_as_asked(tmp_path: Path) -> None:
    layers = {f"layer{i}.weight": 40 for i in range(16)}
    runs = [read_record(fabricate(tmp_path / "run", zerofl(), rounds=2, measure=True, layers=layers))]
    titles = [one.title for one in paper_figure("zerofl-3", runs).plots]
    assert titles == [f"layer{i}" for i in (0, 3, 6, 9, 12, 15)]
    assert [one.title for one in paper_figure("zerofl-3", runs, ("layer4", "layer9.weight")).plots] == [
        "layer4",
        "layer9",
    ]
    with pytest.raises(InputError, match="unknown layer conv9; the layers are layer0, layer1"):
        paper_figure("zerofl-3", runs, ("conv9", "layer1"))


def test_zerofl_4_sweeps_r_mask(tmp_path: Path) -> None:
    masks = (0.0, 0.2, 0.6)
    made = {
        (upload, r): [
            fabricate(tmp_path / f"{upload}{r}{s}", zerofl(r_mask=r, upload=upload), seed=s, rounds=5) for s in range(3)
        ]
        for upload in ("top_diff", "top_weights")
        for r in masks
    }
    full = [fabricate(tmp_path / f"full{s}", zerofl(upload="full"), seed=s, rounds=5) for s in range(3)]
    (panel,) = panels("zerofl-4", [*chain(*made.values()), *full])
    for upload in ("top_diff", "top_weights"):
        ends = [accuracy(made[upload, r]) for r in masks]
        line = panel.lines[upload.replace("_", " ")]
        close(line, list(masks), [mean for mean, _ in ends], [spread for _, spread in ends])
        assert line.bars
        assert not any(line.hollow)
    mean, spread = accuracy(full)
    close(panel.lines["full"], [0, 0.6], [mean] * 2, [spread] * 2)
    assert panel.lines["full"].level


def test_flash_1_places_the_end_over_density_and_rings_what_goes_on(tmp_path: Path) -> None:
    done = {0.05: 8, 0.1: 5}
    runs = {
        d: [fabricate(tmp_path / f"{d}{s}", flash(d), seed=s, rounds=8, done=done[d]) for s in (0, 1)] for d in done
    }
    dense = fabricate(tmp_path / "dense", DENSE, rounds=8)
    hetero = fabricate(tmp_path / "hetero", {"kind": "HeteroFLASH", "densities": [0.2, 0.1]}, rounds=8)
    sent, kept = panels("flash-1", [*runs[0.1], *runs[0.05], dense, hetero])
    assert [panel.title for panel in (sent, kept)] == ["(a) accuracy by bytes", "(b) accuracy by density"]
    assert list(sent.lines) == ["FLASH, d = 0.1", "FLASH, d = 0.05", "FedAvg", "HeteroFLASH, d = 0.2"]
    ends = [accuracy(runs[d]) for d in (0.05, 0.1)]
    close(kept.lines["FLASH"], [0.05, 0.1], [mean for mean, _ in ends], [spread for _, spread in ends])
    assert list(kept.lines["FLASH"].hollow) == [False, True]
    close(kept.lines["FedAvg"], [0.05, 0.2], [accuracy([dense])[0]] * 2, [0, 0])
    close(kept.lines["HeteroFLASH, d = 0.2"], [0.2], [accuracy([hetero])[0]], [0])
    assert "Hollow" in paper_figure("flash-1", [read_record(runs[0.1][0])]).full_caption
    assert "Hollow" not in paper_figure("flash-1", [read_record(runs[0.05][0])]).full_caption


def own(field: str, value: Any, target: float | None = None, **about: Any) -> dict[str, Any]:
    """Return the arguments of a run whose method is not one of the project's."""
    about = {"class": "mine:Mine", "method": "mine", "target_density": target} | about
    return {"method": {"kind": "Mine", field: value}, "about": about, "rounds": 4}


def measured(folder: Path, density: float | None) -> Path:
    change_rows(folder, lambda row: row | {"density": density})
    change(folder / "summary.json", density=density)
    return folder


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


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


def test_a_band_that_reaches_below_zero_has_a_logarithmic_axis_all_the_same(tmp_path: Path) -> None:
    folders = [fabricate(tmp_path / f"{seed}", flash(0.1), seed=seed, rounds=3) for seed in (0, 1)]
    for folder, first in zip(folders, (10**7, 10**3), strict=True):
        rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        rows = [row | {"bytes_up": first if row["round"] == 1 else 10**4} for row in rows]
        (folder / "rounds.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    report(folders, tmp_path / "page.html")
    assert "Bytes up in a round" in (tmp_path / "page.html").read_text()


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


def test_bytes_that_were_not_counted_end_the_line(tmp_path: Path) -> None:
    folder = fabricate(tmp_path / "run", flash(0.1), rounds=6)
    change_rows(folder, lambda row: row | ({"bytes_up": None} if row["round"] == 4 else {}))
    sent, _ = panels("flash-1", [folder])
    assert len(sent.lines["FLASH, d = 0.1"].x) == 3


def test_flash_2_shows_accuracy_and_mismatch_side_by_side(tmp_path: Path) -> None:
    folders = every_figure(tmp_path, seeds=2)["flash-2"]
    dense = fabricate(tmp_path / "dense", DENSE, rounds=22)
    shown = panels("flash-2", [*folders, dense])
    assert [panel.title for panel in shown] == ["(a) centralised", "(b) FL", "(c) centralised", "(d) FL"]
    assert list(shown[1].lines) == ["dense", "d = 0.1", "d = 0.05"]
    assert list(shown[3].lines) == ["d = 0.1", "d = 0.05"]
    assert shown[3].lines["d = 0.1"].look == shown[1].lines["d = 0.1"].look == 1
    rows = [rows_of(folder)[1:] for folder in folders[3::4]]
    mismatch = 100 * np.array([[row["mismatch"] for row in one] for one in rows])
    close(shown[3].lines["d = 0.1"], list(range(2, 23)), list(mismatch.mean(0)), list(mismatch.std(0, ddof=1)))
    assert len(panels("flash-2", folders[2:4])) == 2


def test_sparsefedpp_1_has_a_place_for_every_sparsity(tmp_path: Path) -> None:
    cuts = (0.9, 0.99, 0.999)
    made = {
        cut: [
            fabricate(tmp_path / f"{cut}{s}", {"kind": "SparseFedPP", "sparsity": cut}, seed=s, rounds=4)
            for s in (0, 1, 2)
        ]
        for cut in cuts
    }
    other = fabricate(tmp_path / "flash", flash(0.01), rounds=4)
    (panel,) = panels("sparsefedpp-1", [*chain(*made.values()), other])
    assert panel.x.steps == ("0.9", "0.99", "0.999")
    ends = [accuracy(made[cut]) for cut in cuts]
    close(panel.lines["SparseFedPP"], [0, 1, 2], [mean for mean, _ in ends], [spread for _, spread in ends])
    close(panel.lines["FLASH"], [1], [accuracy([other])[0]], [0])


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


@pytest.mark.parametrize("lost", [float("nan"), 1e308, -0.5, 1.5, "0.9", True, None, [], {"a": 2}])
def test_what_is_no_share_is_left_out(tmp_path: Path, lost: Any) -> None:
    folder = fabricate(tmp_path / "run", flash(0.1), rounds=5, measure=True)
    layers = dict.fromkeys(LAYERS, lost)
    bad = {"accuracy": lost, "mismatch": lost, "layers": layers}
    change_rows(folder, lambda row: row | (bad if row["round"] == 3 else {}))
    assert list(panels("zerofl-1", [folder])[0].lines["90 % sparse"].x) == [1, 2, 4, 5]
    assert list(panels("flash-2", [folder])[1].lines["d = 0.1"].x) == [2, 4, 5]
    assert list(panels("zerofl-2", [folder])[0].lines["fc1"].x) == [1, 2, 4, 5]
    change_rows(folder, lambda row: row | bad | {"layers": lost})
    with pytest.raises(InputError, match="tested round"):
        panels("zerofl-1", [folder])
    with pytest.raises(InputError, match="--measure masks"):
        panels("zerofl-2", [folder])


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


DAMAGES = {
    "text": lambda path: path.write_text("masks"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "directory": lambda path: (path.unlink(), path.mkdir()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "no metadata": lambda path: __import__("safetensors.numpy").numpy.save_file({"a": np.zeros(2, np.uint8)}, path),
    "numel too large": lambda path: write_masks(path, {"a": np.ones(20, bool)}, {"a": 10**12}),
    "numel of text": lambda path: write_masks(path, {"a": np.ones(20, bool)}, {"a": "20"}),
    "numel of bool": lambda path: write_masks(path, {"a": np.ones(1, bool)}, {"a": True}),
    "negative": lambda path: write_masks(path, {"a": np.ones(20, bool)}, {"a": -20}),
    "no object": lambda path: write_masks(path, {"a": np.ones(20, bool)}, [20]),
    "nothing": lambda path: write_masks(path, {"a": np.ones(20, bool)}, {}),
    "absent layer": lambda path: write_masks(path, {"a": np.ones(20, bool)}, {"a": 20, "b": 20}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_masks_is_named(tmp_path: Path, damage: str) -> None:
    run = fabricate(tmp_path / "run", zerofl(), rounds=30, measure=True)
    path = run / "masks/000001.safetensors"
    DAMAGES[damage](path)
    with pytest.raises(InputError, match=rf"{re.escape(str(path))} is damaged: restore the file, or remove it"):
        write_figure("zerofl-3", [run], tmp_path / "a.png")
    with pytest.raises(InputError, match="is damaged"):
        report([run], tmp_path / "report.html")


def test_a_file_of_other_layers_is_named(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", zerofl(), rounds=30, measure=True)
    write_masks(run / "masks/000020.safetensors", {"conv1.weight": np.ones(99, bool)})
    with pytest.raises(InputError, match=r"000020.safetensors does not hold 100 positions of conv1.weight"):
        write_figure("zerofl-3", [run], tmp_path / "a.png")


def test_other_files_beside_the_masks_are_none_of_ours(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", zerofl(), rounds=30, measure=True)
    (run / "masks/notes.safetensors").write_text("mine")
    (run / "masks/000099.safetensors.tmp").write_text("half")
    files = recorded_rounds(read_record(run))
    assert list(files) == [1, 20, 30]
    assert mask_sizes(files[1]) == LAYERS


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
