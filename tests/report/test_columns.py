"""Any column by any other: the lines by arithmetic of their own, the files, and every mistake in one line."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from command_line import CommandLine
from fabricated import fabricate
from fedsieve.report.columns import plot_columns, write_plot
from fedsieve.report.plots import LinePlot
from fedsieve.runs.record import read_record
from fedsieve.types import InputError
from figure_runs import change_rows, close, flash, rows_of, zerofl


def with_more(seed: int, row: dict[str, Any]) -> dict[str, Any]:
    return row | {"r2": row["accuracy"] - 2 - seed / 9, "kernels": {"dense": 5}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """FLASH at two densities and ZeroFL, three seeds each; a metric that is below zero; one run is not finished."""
    root = tmp_path_factory.mktemp("runs")
    plots = []
    for i, method in enumerate((flash(0.05), flash(0.2), zerofl(0.9))):
        for seed in range(3):
            done = 6 if (i, seed) == (1, 2) else None
            plots.append(fabricate(root / f"{i}-{seed}", method, seed=seed, rounds=8, done=done))
            change_rows(plots[-1], partial(with_more, seed))
    return plots


def drawn(y: str, x: str, folders: list[Path], *by: str, log: str = "") -> LinePlot:
    (plot,) = plot_columns(y, x, by, [read_record(folder) for folder in folders], log).plots
    assert isinstance(plot, LinePlot)
    return plot


def table(folders: list[Path], column: str, rounds: int) -> Any:
    return np.array([[row[column] for row in rows_of(folder)[:rounds]] for folder in folders])


def test_a_column_by_rounds_has_a_line_for_each_value_of_a_setting(folders: list[Path]) -> None:
    plot = drawn("r2", "round", folders, "method.density")
    assert [*plot.lines] == ["density 0.05", "density 0.2", "density –"]
    for line, own, rounds in zip(plot.lines.values(), (folders[:3], folders[3:6], folders[6:]), (8, 6, 8), strict=True):
        values = table(own, "r2", rounds)
        close(line, [*range(1, rounds + 1)], [*values.mean(0)], [*values.std(0, ddof=1)])
    assert plot.title == "mean ± standard deviation over seeds"
    assert plot.y.name == "r2"
    assert plot.y.signed
    assert plot.x.whole


def test_a_column_by_the_sum_of_another(folders: list[Path]) -> None:
    plot = drawn("accuracy", "total:bytes_up", folders[:3])
    (line,) = plot.lines.values()
    accuracy, sent = table(folders[:3], "accuracy", 8), table(folders[:3], "bytes_up", 8).cumsum(1)
    close(line, [*sent.mean(0) / 1e3], [*accuracy.mean(0)], [*accuracy.std(0, ddof=1)])
    assert plot.x.name == "total bytes_up, 10³"
    plain = drawn("bytes_up", "accuracy", folders[:1])
    assert [*plain.lines["FLASH"].x] == [row["accuracy"] for row in rows_of(folders[0])]
    assert (plain.y.name, plain.title) == ("bytes_up, 10³", "")  # of one seed: no band


def test_a_column_by_a_setting_is_that_of_the_ends(folders: list[Path]) -> None:
    plot = drawn("accuracy", "method.density", folders, "method")
    assert [*plot.lines] == ["FLASH"]
    ends = [np.array([rows_of(f)[-1]["accuracy"] for f in folders[i : i + 3]]) for i in (0, 3)]
    (line,) = plot.lines.values()
    close(line, [0.05, 0.2], [e.mean() for e in ends], [e.std(ddof=1) for e in ends])
    assert line.bars
    assert [*line.hollow] == [False, True]
    by_seed = drawn("accuracy", "seed", folders, "method.density").lines
    assert [len(line.x) for line in by_seed.values()] == [3, 3, 3]


def test_what_a_setting_does_not_tell_apart_is_told_by_more(folders: list[Path]) -> None:
    plot = drawn("accuracy", "round", folders, "method")
    assert [*plot.lines] == ["FLASH, density 0.05", "FLASH, density 0.2", "ZeroFL"]
    assert [*drawn("accuracy", "round", folders).lines] == [*plot.lines]
    assert [*drawn("kernels.dense", "round", folders[:1]).lines["FLASH"].y] == [5.0] * 8


def test_files_are_drawn_and_are_the_same_every_time(
    tmp_path: Path, folders: list[Path], fedsieve: CommandLine
) -> None:
    words = ("accuracy", "total:bytes_up", *folders, "--by", "method.density", "--log", "x")
    said = fedsieve("plot", *words).stdout
    assert said == "wrote accuracy-total_bytes_up.png\n"
    with Image.open(tmp_path / "accuracy-total_bytes_up.png") as image:
        assert image.width == round(300 * 3.4)
        assert len(image.convert("RGB").getcolors(10**6) or []) > 10
    for name in ("a.svg", "b.svg", "a.pdf", "b.pdf"):
        fedsieve("plot", *words, "-o", name)
    for suffix in ("svg", "pdf"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


@pytest.mark.parametrize(
    ("y", "x", "by", "log", "line"),
    [
        ("acuracy", "round", [], "", "plot: there is no column 'acuracy'; did you mean accuracy"),
        ("accuracy", "total:byte_up", [], "", "plot: there is no column 'total:byte_up'; did you mean bytes_up"),
        ("accuracy", "method.densty", [], "", "plot: there is no column 'method.densty'; did you mean method.density"),
        (
            "accuracy",
            "round",
            ["densitty"],
            "",
            "plot --by: there is no setting 'densitty'; did you mean method.density",
        ),
        ("accuracy", "zzz", [], "", "plot: there is no column 'zzz'; round, accuracy, density, "),
        ("accuracy", "task.partition", [], "", "plot: no run given has a number of accuracy and of task.partition yet"),
        ("r2", "round", [], "y", "plot: --log is for numbers above 0, and r2 has others"),
        ("r2", "round", [], "z", "--log must be x, y or xy, got 'z'"),
    ],
)
def test_mistakes_are_one_line(
    y: str, x: str, by: list[str], log: str, line: str, folders: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError) as error:
        write_plot(y, x, by, folders, tmp_path / "plot.png", log)
    assert str(error.value).startswith(line)
    assert not (tmp_path / "plot.png").exists()


def test_so_are_folders_without_a_run_and_other_files(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no run directory is .*\*: name some"):
        write_plot("accuracy", "round", [], [tmp_path / "*"], tmp_path / "plot.png")
    with pytest.raises(InputError, match=r"does not end in .png, .pdf or .svg: choose one, such as plot.pdf"):
        write_plot("accuracy", "round", [], folders, tmp_path / "plot.jpg")


def test_a_sum_goes_as_far_as_every_round_has_a_number(tmp_path: Path) -> None:
    folder = fabricate(tmp_path / "run", flash(0.1), rounds=4)
    change_rows(folder, lambda row: row | {"bytes_up": None if row["round"] == 3 else 10})
    assert drawn("accuracy", "total:bytes_up", [folder]).lines["FLASH"].x == [10.0, 20.0]
