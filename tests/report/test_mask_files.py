"""The recorded supports of a run: read in their order, and refused where they are damaged."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from fabricated import LAYERS, fabricate, write_masks
from fedsieve.report import report
from fedsieve.report.figures import paper_figure, write_figure
from fedsieve.report.figures.layers import (
    LENGTH,
    STRETCHES,
    mask_sizes,
    masks_at,
    recorded_rounds,
    sampled_positions,
)
from fedsieve.runs.record import read_record
from fedsieve.types import InputError
from figure_runs import zerofl


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
