"""The papers' figures: the numbers that are drawn."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fabricated import LAYERS, fabricate
from fedsieve.report import report
from fedsieve.report.figures import paper_figure
from fedsieve.runs.record import read_record
from fedsieve.types import InputError
from figure_runs import DENSE, accuracy, change_rows, close, every_figure, flash, panels, rows_of, zerofl


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


def test_zerofl_4_has_a_panel_for_each_sparsity(tmp_path: Path) -> None:
    made = {
        (sparsity, r): fabricate(tmp_path / f"{sparsity}{r}", zerofl(sparsity, r), rounds=3)
        for sparsity in (0.95, 0.9)
        for r in (0.1, 0.3)
    }
    full = {s: fabricate(tmp_path / f"full{s}", zerofl(s, upload="full"), rounds=3) for s in (0.95, 0.5)}
    dense = fabricate(tmp_path / "dense", DENSE, rounds=3)
    late = fabricate(tmp_path / "late", zerofl(0.8), rounds=3, done=0)
    shown = panels("zerofl-4", [*made.values(), *full.values(), dense, late])
    assert [panel.title for panel in shown] == ["90 % sparse", "95 % sparse"]  # 80 % is not tested yet
    assert [[*panel.lines] for panel in shown] == [
        ["top weights", "full", "FedAvg"],
        ["top weights", "full, sparsity 0.95", "full, sparsity 0.5", "FedAvg"],
    ]
    for panel, sparsity in zip(shown, (0.9, 0.95), strict=True):
        ends = [accuracy([made[sparsity, r]])[0] for r in (0.1, 0.3)]
        close(panel.lines["top weights"], [0.1, 0.3], ends, [0, 0])
        close(panel.lines["FedAvg"], [0.1, 0.3], [accuracy([dense])[0]] * 2, [0, 0])
    close(shown[1].lines["full, sparsity 0.95"], [0.1, 0.3], [accuracy([full[0.95]])[0]] * 2, [0, 0])
    assert len({panel.lines["top weights"].look for panel in shown}) == 1
    assert len({panel.lines["FedAvg"].look for panel in shown}) == 1


def test_zerofl_1_shows_validation_accuracy_where_all_runs_of_a_panel_measured_it(tmp_path: Path) -> None:
    def made(name: str, validated: bool, **spec: Any) -> Path:
        folder = fabricate(tmp_path / name, spec.pop("method", zerofl()), rounds=3, **spec)
        change_rows(folder, lambda row: row | ({"accuracy_validation": row["round"] / 10} if validated else {}))
        return folder

    folders = [made("central", True, clients=1), made("central too", True, clients=1, done=0)]
    folders += [made("iid", True, partition="iid"), made("iid 2", False, partition="iid", method=zerofl(0.95))]
    shown = panels("zerofl-1", folders)
    assert [panel.y.name for panel in shown] == ["validation accuracy, %", "accuracy, %"]
    close(shown[0].lines["90 % sparse"], [1, 2, 3], [10, 20, 30], [0] * 3)
    close(shown[1].lines["90 % sparse"], [1, 2, 3], [accuracy(folders[2:3], t)[0] for t in range(3)], [0] * 3)
    whole = paper_figure("zerofl-1", [read_record(folder) for folder in folders])
    assert whole.full_caption.startswith("Accuracy over rounds, by sparsity. Validation: ")


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


def test_a_band_that_reaches_below_zero_has_a_logarithmic_axis_all_the_same(tmp_path: Path) -> None:
    folders = [fabricate(tmp_path / f"{seed}", flash(0.1), seed=seed, rounds=3) for seed in (0, 1)]
    for folder, first in zip(folders, (10**7, 10**3), strict=True):
        rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        rows = [row | {"bytes_up": first if row["round"] == 1 else 10**4} for row in rows]
        (folder / "rounds.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    report(folders, tmp_path / "page.html")
    assert "Bytes up in a round" in (tmp_path / "page.html").read_text()


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
