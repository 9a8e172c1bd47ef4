"""A sweep: the grid and its mistakes, its end after a kill, and the table beside the paper's."""

import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from command_line import CommandLine
from fedsieve.recipes.papers import Published
from fedsieve.recipes.papers.protocol import Statement
from fedsieve.runs.comparison import Comparison, settings_of
from fedsieve.runs.execution import Execution
from fedsieve.runs.record import RunRecord, read_rows
from fedsieve.runs.sweep import table as tables
from fedsieve.runs.sweep.grid import Grid, axis_values, default_folder, describe_sweep, grid, open_folder
from fedsieve.runs.sweep.table import CellResult, show_table
from fedsieve.types import InputError
from tiny import TIMES

SHORT = ("-s", "rounds=2", "--seeds", "2")
MAIN = "from fedsieve.cli import main; main()"


def start(*words: str, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAIN, "sweep", *words]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def sweep(*words: str, cwd: Path, code: int = 0) -> tuple[str, str]:
    with start(*words, cwd=cwd) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return out, err


def test_the_grid_is_the_product_of_recipes_axes_and_seeds() -> None:
    found = grid(["zerofl.digits", "topk.digits"], ["method.sparsity=.9,.95", "rounds=2", "lr=.1,.2"], 3)
    assert [(c.recipe, c.run.method.sparsity, c.run.lr) for c in found.cells] == [
        (recipe, sparsity, lr) for recipe in found.recipes for sparsity in (0.9, 0.95) for lr in (0.1, 0.2)
    ]
    assert all(cell.run.rounds == 2 for cell in found.cells)
    assert found.cells[0].label == "zerofl.digits sparsity=.9 lr=.1"  # rounds, the same everywhere, tells nothing apart
    jobs = found.jobs(Path("here"))
    assert len(jobs) == len({job.folder for job in jobs}) == 24
    assert [job.run.seed for job in jobs[::8]] == [0, 1, 2]
    assert jobs[0].folder == Path("here/runs/01-zerofl.digits,sparsity=.9,lr=.1-seed0")


def test_values_with_commas_stand_between_semicolons() -> None:
    assert axis_values("lr", ".1,.2", several=False) == [".1", ".2"]
    assert axis_values("method.policy", "conv1,fc1;", several=False) == ["conv1,fc1"]
    assert axis_values("method.policy", "conv1,fc1; all", several=False) == ["conv1,fc1", "all"]
    tiers = [cell.run.task.tiers for cell in grid(["fedavg.digits"], ["task.tiers=1;.4,.3,.3"], 1).cells]
    assert tiers == [(1.0,), (0.4, 0.3, 0.3)]
    assert [cell.run.task.tiers for cell in grid(["fedavg.digits"], ["task.tiers=.5,.5"], 1).cells] == [(0.5, 0.5)]


def test_fields_of_the_same_last_name_keep_their_whole_names() -> None:
    (cell, *_) = grid(["fedavg.digits"], ["method.server=adam", "method.server.eta=.1,.2", "lr=.1"], 1).cells
    assert cell.swept == {"eta": ".1"}
    (cell, *_) = grid(["zerofl.digits"], ["method.policy=all,zerofl", "rounds=1,2"], 1).cells
    assert cell.swept == {"policy": "all", "rounds": "1"}


MISTAKES = {
    "an unknown recipe": (("zerofl.digit",), "unknown recipe 'zerofl.digit'"),
    "an unknown field": (("topk.digits", "-s", "method.r_mask=.1"), "topk.digits -s method.r_mask=.1: unknown field"),
    "a field that no recipe has": (
        ("zerofl.digits", "fedavg.digits", "-s", "method.density=.9"),
        "zerofl.digits -s method.density=.9: unknown field 'method.density'",
    ),
    "a wrong type": (("topk.digits", "-s", "rounds=2,x"), "-s rounds=x: rounds must be a whole number, got 'x'"),
    "an impossible value": (("topk.digits", "-s", "method.sparsity=.9,1.2"), "sparsity must lie in [0, 1), got 1.2"),
    "an empty value": (("topk.digits", "-s", "lr=.1,,.2"), "-s lr=.1,,.2: a value is empty"),
    "no value": (("topk.digits", "-s", "lr="), "-s lr=: a value is empty"),
    "no equals sign": (("topk.digits", "-s", "lr"), "write it as name=value"),
    "a name twice": (("topk.digits", "-s", "lr=.1", "-s", "lr=.2"), "lr is named twice"),
    "a seed": (("topk.digits", "-s", "seed=1"), "chosen by --seeds N"),
    "a recipe twice": (("topk.digits", "topk.digits"), "recipe topk.digits is named twice"),
    "the same run twice": (("topk.digits", "-s", "lr=.1,0.1"), "are the same run"),
    "no jobs": (("topk.digits", "--jobs", "0"), "--jobs must be at least 1"),
    "no seeds": (("topk.digits", "--seeds", "0"), "--seeds must be at least 1"),
    "an unfit policy": (("topk.digits", "-s", "method.policy=all,x"), "policy=x: policy 'x' matches no layer"),
    "missing data": (("topk.digits", "topk.mnist"), "topk.mnist: mnist needs a data folder"),
    "a foreign directory": (("topk.digits", "--out", "."), "is not empty and holds no sweep: choose another --out"),
    "a table of nothing": (("topk.digits", "--table"), "holds no sweep yet"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_before_anything_runs(
    name: str, tmp_path: Path, fedsieve: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, line = MISTAKES[name]
    (tmp_path / "mine").touch()
    monkeypatch.delenv("FEDSIEVE_DATA", raising=False)
    said = fedsieve("sweep", *words, code=2).stderr
    assert said.count("\n") == 1
    assert line in said
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]


def test_a_directory_belongs_to_one_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one, other = grid(["topk.digits"], ["lr=.1,.2"], 1), grid(["topk.digits"], ["lr=.1"], 1)
    assert default_folder(one) == Path("sweeps/topk.digits-1")
    with open_folder(default_folder(one), one), pytest.raises(InputError, match="another process is at work"):
        open_folder(default_folder(one), one).__enter__()
    assert default_folder(one) == Path("sweeps/topk.digits-1")
    assert default_folder(other) == Path("sweeps/topk.digits-2")
    with pytest.raises(InputError, match=r"settings -s lr=\.1;\.2 there, -s lr=\.1 here\): choose another --out"):
        open_folder(Path("sweeps/topk.digits-1"), other).__enter__()
    (tmp_path / "sweeps/topk.digits-1/sweep.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        open_folder(Path("sweeps/topk.digits-1"), one).__enter__()


def kept(folder: Path) -> dict[str, object]:
    """Return what a sweep left that no clock has a part in."""
    found: dict[str, object] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in ("run.json", "summary.json")):
        name = str(path.relative_to(folder))
        found[name] = path.read_bytes()
        if path.parent.name == "checkpoints":  # whose header names its parts in any order
            found[name] = {name: value.numpy().tobytes() for name, value in load_file(path).items()}
        if path.name == "rounds.jsonl":
            found[name] = [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(path.parent)]
    return found


def stop(folder: Path, end: signal.Signals, *words: str) -> tuple[int, str]:
    """Start a sweep, send it a signal in its second round, and see that its processes end with it."""
    with start(*words, cwd=folder) as process:
        assert process.stdout
        next(line for line in process.stdout if "round 2/3" in line)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(end)
        _, said = process.communicate(timeout=60)
    time.sleep(0.5)
    assert children
    assert not [pid for pid in children if alive(pid)]
    return process.returncode, said


@pytest.mark.system
def test_a_killed_sweep_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    words = ("topk.digits", "zerofl.digits", "-s", "rounds=3", "--seeds", "1", "--jobs", "2")
    assert stop(tmp_path, signal.SIGKILL, *words)[0] == -signal.SIGKILL
    folder = tmp_path / "sweeps/topk.digits+zerofl.digits-1"
    assert not (folder / "table.md").exists()
    sweep(*words, cwd=tmp_path)
    sweep(*words, "--out", "undisturbed", cwd=tmp_path)
    assert kept(folder) == kept(tmp_path / "undisturbed")
    said, _ = sweep(*words, cwd=tmp_path)
    assert "2 runs, 2 of them finished; 0 to run" in said
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.system
def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    code, said = stop(tmp_path, signal.SIGINT, "topk.digits", "-s", "rounds=3", "--seeds", "1")
    assert code == 130
    assert said == "\nfedsieve: stopped; every finished round is on disk: the same command goes on\n"


def alive(pid: str) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished sweep of two cells, run to round 1 first."""
    folder = tmp_path_factory.mktemp("sweep")
    words = ("topk.digits", *SHORT, "-s", "method.sparsity=.9,.95", "--jobs", "2", "--out", "out")
    said, _ = sweep(*words, "--until", "1", cwd=folder)
    assert re.search(r"rounds .*\n.* 1/2 ", said)
    said, _ = sweep(*words, cwd=folder)
    assert "round 1/2" not in said
    again, _ = sweep(*words, "--table", cwd=folder)
    assert "to run" not in again
    assert again.splitlines()[-4:] == said.splitlines()[-4:]
    return folder / "out"


def test_a_field_of_the_method_concerns_the_recipes_that_have_it() -> None:
    found = grid(["fedavg.digits", "nst.digits", "zerofl.digits"], ["method.density=.05,.1", "rounds=2"], 1)
    assert [(cell.recipe, cell.swept) for cell in found.cells] == [
        ("fedavg.digits", {}),
        ("nst.digits", {"density": ".05"}),
        ("nst.digits", {"density": ".1"}),
        ("zerofl.digits", {}),
    ]
    assert all(cell.run.rounds == 2 for cell in found.cells)
    rows = tables.cell_results(found, Path("nowhere"))
    assert tables.columns(rows)["method.density"] == ["-", ".05", ".1", "-"]
    one = tables.cell_results(
        grid(["fedavg.digits", "nst.digits"], ["method.density=.05", "rounds=2"], 1), Path("nowhere")
    )
    assert tables.markdown(one).endswith("\nAll with rounds=2. Methods that have it with method.density=.05.\n")
    with pytest.raises(InputError, match="unknown measure 'mask'"):
        Execution(measure="mask")
    assert describe_sweep(grid(["fedavg.digits"], [], 1, Execution(measure="masks"))) != describe_sweep(
        grid(["fedavg.digits"], [], 1)
    )
    with pytest.raises(InputError, match=r"unknown field 'method\.dense'"):
        grid(["fedavg.digits", "nst.digits"], ["method.dense=1"], 1)


def same_grid() -> Grid:
    return grid(["topk.digits"], ["rounds=2", "method.sparsity=.9,.95"], 2)


@pytest.mark.system
def test_the_results_are_what_the_summaries_say(finished: Path) -> None:
    assert json.loads((finished / "sweep.json").read_text()) == describe_sweep(same_grid())
    cells = json.loads((finished / "results.json").read_text())["cells"]
    for cell, number in zip(cells, ("01", "02"), strict=True):
        runs = [json.loads(path.read_text()) for path in sorted(finished.glob(f"runs/{number}-*/summary.json"))]
        seeds = [100 * run["accuracy"] for run in runs]
        assert cell["accuracy_seeds"] == seeds
        assert cell["accuracy_mean"] == pytest.approx(sum(seeds) / 2)
        assert cell["accuracy_std"] == pytest.approx(statistics.stdev(seeds))
        assert cell["mb_up"] == pytest.approx(sum(run["bytes_up"] for run in runs) / (2 * 2 * 5) / 1e6)
        assert cell["times_less_than_dense"] == pytest.approx(runs[0]["bytes_dense_up"] / runs[0]["bytes_up"], rel=0.05)
        assert cell["multiply_adds_share"] == 1
        assert cell["density"] == pytest.approx((runs[0]["density"] + runs[1]["density"]) / 2)
        assert (cell["rounds"], cell["rounds_planned"], cell["paper"]) == ([2, 2], 2, None)
    table = (finished / "table.md").read_text()
    assert "paper" not in table
    assert f"| topk.digits | .9 | {cells[0]['accuracy_mean']:.2f} ± {cells[0]['accuracy_std']:.2f} |" in table


def printed(folder: Path, width: int) -> str:
    console = Console(width=width, record=True, force_terminal=False, highlight=False, markup=False)
    with console.capture() as capture:
        show_table(same_grid(), folder, console=console)
    return capture.get()


@pytest.mark.system
def test_the_table_fits_the_terminal(finished: Path) -> None:
    wide, narrow = printed(finished, 140), printed(finished, 60)
    assert wide.startswith("recipe ")
    assert narrow.startswith("topk.digits sparsity=.9\n")
    assert "…" not in wide + narrow
    assert all(len(line) <= 60 for line in narrow.splitlines())


@pytest.mark.system
def test_the_paper_stands_beside_a_cell_of_its_very_run(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = settings_of(same_grid().cells[0].run)
    row = Published("t", 1, "topk.digits", (), 12.5, 0.25)

    def beside(settings: dict[str, Any], runs: list[RunRecord | None]) -> list[Comparison]:
        assert len(runs) == 2
        return [Comparison(row, "", (90.0, 91.0)) if settings == wanted else Comparison(row, "2 of 80 rounds")]

    monkeypatch.setattr(tables, "compare_published", beside)
    monkeypatch.setattr(Published, "says", Statement("digits", seeds=2))
    first, second = tables.cell_results(same_grid(), finished)
    wide = " ".join(printed(finished, 200).split())
    assert "12.50 ± 0.25 +78.00" in wide
    assert "2 of 80 rounds -" in wide
    assert "its column says what differs" in " ".join(printed(finished, 60).split())
    assert "| 12.50 ± 0.25 | +78.00 |" in tables.markdown([first, second])
    assert tables.as_json(first)["difference"] == 78
    assert tables.as_json(first)["paper"]["accuracy"] == 12.5
    assert tables.as_json(second)["paper"] is None
    assert tables.as_json(second)["papers"] == [{"row": "t/1", "differs": "2 of 80 rounds", "difference": None}]


@pytest.mark.system
def test_a_failed_run_is_named_and_the_others_finish(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "out")
    for summary in tmp_path.glob("out/runs/01-*/summary.json"):
        summary.unlink()
    next(tmp_path.glob("out/runs/01-*-seed0/checkpoints/000002.safetensors")).write_bytes(b"")
    out, err = sweep("topk.digits", *SHORT, "-s", "method.sparsity=.9,.95", "--out", "out", cwd=tmp_path, code=2)
    assert "4 runs, 2 of them finished; 2 to run" in out
    assert "failed: topk.digits sparsity=.9 seed=0: the checkpoint" in out
    assert "done       -  round 2/2  topk.digits sparsity=.9 seed=1" in out
    assert err.count("\n") == 1
    assert "1 of 4 runs failed, to be tried again by the same command; topk.digits sparsity=.9 seed=0: the ch" in err
    assert "| topk.digits | .9 | " in (tmp_path / "out/table.md").read_text()
    first, _ = tables.cell_results(same_grid(), tmp_path / "out")
    assert first.seeds[0] is first.std is None
    assert first.seeds[1] == first.mean


def test_a_setting_of_a_measures_name_keeps_its_column() -> None:
    cells = grid(["pdst.digits"], ["method.density=.05,.1", "rounds=1,2"], 1).cells
    rows = [CellResult(cell, (90.0,), (1,), 1.0, 2.0, 0.5, 0.07) for cell in cells]
    found = tables.columns(rows)
    assert found["method.density"] == [".05", ".05", ".1", ".1"]
    assert found["rounds"] == ["1", "2", "1", "2"]
    assert found["rounds run"] == ["1/1", "1/2", "1/1", "1/2"]
    assert found["density"] == ["7.0%"] * 4


def test_a_sweep_of_a_regression_shows_its_metric(fedsieve: CommandLine, tmp_path: Path) -> None:
    words = ["topk.diabetes", "-s", "rounds=2", "--seeds", "2", "--out", str(tmp_path / "s")]
    said = fedsieve("sweep", *words)
    cell = json.loads((tmp_path / "s/results.json").read_text())["cells"][0]
    summaries = [json.loads(path.read_text()) for path in sorted((tmp_path / "s/runs").glob("*/summary.json"))]
    assert cell["mse_seeds"] == [summary["mse"] for summary in summaries]
    assert re.search(rf"mse {summaries[0]['mse']:.4g}  round 2/2  topk.diabetes", said.stdout)
    assert re.search(r"recipe +mse +each seed", said.stdout)
    fedsieve("report", *map(str, (tmp_path / "s/runs").iterdir()), "--out", str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert ">Metrics</th>" in page
    assert "<h3>mse over rounds</h3>" in page
    assert "Accuracy" not in page
    assert f"name its runs, {tmp_path / 's/runs'}/*" in fedsieve("report", str(tmp_path / "s"), code=2).stderr
