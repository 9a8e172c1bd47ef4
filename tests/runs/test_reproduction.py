"""Tables of the papers, run: cells, costs, results and the command; two digits recipes stand for a table's rows."""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from command_line import CommandLine
from fedsieve import Data, Dataset, local, open_run
from fedsieve.cli import reproduce as command
from fedsieve.engine.engines import watched
from fedsieve.engine.loop import rounds
from fedsieve.methods import FedAvg
from fedsieve.recipes import load_recipe, papers
from fedsieve.recipes.papers import Published, published
from fedsieve.recipes.papers.parts import PaperPart, find_part, paper_parts
from fedsieve.recipes.papers.protocol import Statement
from fedsieve.runs.execution import Execution
from fedsieve.runs.progress import ClientProgress
from fedsieve.runs.record import read_record
from fedsieve.runs.recorder import locked_directory
from fedsieve.runs.reproduction import cells, plan
from fedsieve.runs.reproduction.cells import cells_of
from fedsieve.runs.reproduction.costs import START, examples_of, measure_cost, own_kernels
from fedsieve.runs.reproduction.plan import Datasets, LackingData, Reproduction
from fedsieve.runs.reproduction.results import is_stale, keep_result, read_result, result_path, row_results
from fedsieve.runs.sweep.jobs import Limits, follow_jobs
from fedsieve.types import InputError
from tiny import tiny_run

SHORT = ("rounds=3", "per_round=2", "task.clients=4", "epochs=1")


def digits_row(number: int, recipe: str, *settings: str) -> Published:
    keys = {"dataset": "mnist", "split": "lda:1.0", "density": "0.05", "method": recipe.partition(".")[0]}
    return Published("flash_table2", number, recipe, (*SHORT, *settings), 50.0, 1.0, keys=keys)


PART = PaperPart(
    "flash",
    "table2",
    (digits_row(1, "pdst.digits"), digits_row(2, "flash.digits", "method.c_d=2", "method.E_d=2")),
)


DAMAGES: list[tuple[tuple[str, ...], object, str]] = [
    (("run", "measure"), 5, "does not say what was measured"),
    (("columns", "round"), [0, 1, 2, 9], "is no finished run"),
    (("columns", "round"), [3, 2, 1, 0], "has its rounds out of order"),
    (("columns", "round"), [], "names no rounds"),
    (("columns", "round"), [0, 1], "has columns of several lengths"),
    (("columns", "accuracy"), [None, None, None, 1e30], "has an accuracy of 1e\\+30 in round 3"),
    (("columns", "accuracy"), [None] * 4, "is no finished run that was tested at its end"),
    (("summary", "rounds"), 2, "is no finished run"),
    (("summary", "accuracy"), "high", "is no finished run"),
    (("columns",), 7, "is no result of a run"),
]


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Iterator[PaperPart]:
    """A table of the papers of two digits runs of three rounds."""
    for module in (cells, command):
        monkeypatch.setattr(module, "paper_parts", lambda: (PART,))
    monkeypatch.setattr(command, "find_part", lambda paper, name: PART)
    monkeypatch.setattr(papers, "statement", lambda table, dataset: Statement("the digits"))
    cells._cells.cache_clear()
    yield PART
    cells._cells.cache_clear()


def test_every_row_of_the_papers_is_one_cell() -> None:
    for part in paper_parts():
        rows = [row.name for cell in cells_of(part) for row in cell.in_part(part).rows]
        assert sorted(rows) == sorted(row.name for row in part.runs)


def test_a_run_in_several_tables_is_one_cell_tested_as_often_as_any_reads() -> None:
    flash = next(cell for cell in cells_of(find_part("flash", "table3")) if cell.name == "flash_table2/25")
    assert {row.name for row in flash.rows} == {"flash_table2/25", "flash_table3/2"}
    first, best = find_part("zerofl", "table1"), find_part("zerofl", "table3")
    [speech] = [cell for cell in cells_of(best, [1]) if cell in cells_of(first)]
    assert speech.run.evaluate_every == 1  # Table 3 reads the best of all rounds
    assert speech.in_part(first).run.evaluate_every == 200  # Table 1 that of round 200
    assert all(cell.measure == ("masks",) for cell in cells_of(find_part("zerofl", "figure2")))
    nst = next(cell for cell in cells_of(find_part("flash", "figure2_mnist")) if cell.recipe == "nst.mnist")
    assert (nst.run.evaluate_every, nst.measure) == (10, ("masks",))
    assert nst.in_part(find_part("flash", "table2")).measure == ()


def test_the_authors_twin_is_another_cell() -> None:
    [cell] = cells_of(find_part("flash", "table2"), [14])
    twin = cell.as_authors()
    assert twin
    row = published()[[one.name for one in published()].index("flash_table2/14")]
    assert set(row.authors) <= set(twin.settings)
    assert load_recipe(twin.recipe, twin.settings) == twin.run != cell.run
    assert result_path(Path(), twin, 1).name == "flash_table2-14-authors-seed1.json"


def test_a_table_is_run_kept_and_never_run_again(part: PaperPart, fedsieve: CommandLine, tmp_path: Path) -> None:
    words = ("reproduce", "flash", "table2", "--seeds", "1", "--out", str(tmp_path))
    out = fedsieve(*words, "--jobs", "2").stdout
    assert "2 cells, 1 seeds; 0 runs done; about" in out
    assert "done " in out
    files = sorted((tmp_path / "flash" / "results").iterdir())
    assert [path.name for path in files] == ["flash_table2-1-seed0.json", "flash_table2-2-seed0.json"]
    assert all(path.stat().st_size < 20_000 for path in files)
    record, run = read_result(files[1]), read_record(tmp_path / "runs" / "flash_table2-2-seed0")
    assert record
    assert record.whole
    assert not is_stale(record)
    assert record.final("accuracy") == run.final("accuracy")
    assert record.series("bytes_up") == run.series("bytes_up")
    assert record.series("loss")[1] == pytest.approx(run.series("loss")[1], rel=1e-5)
    accuracy = f"{100 * (run.final('accuracy') or 0):.2f}"
    assert accuracy in fedsieve(*words, "--table", "md").stdout
    shutil.rmtree(tmp_path / "runs")  # on another machine: the results alone
    assert "2 runs done; nothing to run" in fedsieve(*words).stdout
    assert not (tmp_path / "runs").exists()
    listed = fedsieve("reproduce", "flash", "--seeds", "2", "--out", str(tmp_path)).stdout
    assert "flash table2" in listed
    files[0].write_text(files[0].read_text().replace('"batch": 16', '"batch": 8'))
    before = files[0].read_text()
    assert "is of another protocol than flash_table2/1 (batch 8, not 16)" in fedsieve(*words, code=2).stderr
    files[0].write_text(before[:200])
    assert "is not a JSON object: restore it, or remove it" in fedsieve(*words, "--table", "md", code=2).stderr
    assert files[0].read_text() == before[:200]
    good = json.loads(files[1].read_text())
    for where, value, line in DAMAGES:
        holder = good
        for name in where[:-1]:
            holder = holder[name]
        kept, holder[where[-1]] = holder[where[-1]], value
        files[1].write_text(json.dumps(good))
        holder[where[-1]] = kept
        with pytest.raises(InputError, match=line):
            read_result(files[1])
    files[1].with_name("flash_table2-2-seed1.json").write_text(json.dumps(good))
    with pytest.raises(InputError, match="is of seed 0, not 1: move it away"):
        row_results(tmp_path, PaperPart("flash", "table2", PART.runs[1:]), [1])


def test_a_run_that_ended_before_it_was_kept_is_kept_not_run(part: PaperPart, tmp_path: Path) -> None:
    cell = cells_of(part)[0]
    reproduction = Reproduction(tmp_path, Datasets(None))
    [first, _] = reproduction.plan(cells_of(part), 1, print)
    follow_jobs([first.job(Execution())], Limits(), Console(quiet=True))
    assert not result_path(tmp_path, cell, 0).exists()
    assert reproduction.result(cell, 0)
    assert result_path(tmp_path, cell, 0).exists()
    assert [one.cell.name for one in reproduction.plan(cells_of(part), 1, print)] == ["flash_table2/2"]


def test_a_run_without_what_a_row_needs_is_named(part: PaperPart, tmp_path: Path) -> None:
    reproduction = Reproduction(tmp_path, Datasets(None))
    [first, _] = reproduction.plan(cells_of(part), 1, print)
    follow_jobs([first.job(Execution())], Limits(), Console(quiet=True))
    manifest = first.folder / "run.json"
    manifest.write_text(manifest.read_text().replace('"evaluate_every": 3', '"evaluate_every": 2'))
    with pytest.raises(InputError, match="has run without what flash_table2/1 needs"):
        reproduction.plan(cells_of(part), 1, print)


def test_a_result_that_cannot_be_kept_leaves_the_others(part: PaperPart, fedsieve: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "flash").mkdir()
    (tmp_path / "flash" / "results").write_text("no folder")
    err = fedsieve("reproduce", "flash", "table2", "--seeds", "1", "--out", str(tmp_path), code=2).stderr
    assert "2 of 2 runs failed" in err
    assert (tmp_path / "flash" / "results").read_text() == "no folder"
    file = tmp_path / "file"
    file.write_text("mine")
    assert "is a file: name a folder" in fedsieve("reproduce", "flash", "table2", "--out", str(file), code=2).stderr


def test_a_deadline_pauses_after_a_round_and_the_run_goes_on_as_if_undisturbed(part: PaperPart, tmp_path: Path) -> None:
    jobs = [
        Reproduction(tmp_path / name, Datasets(None)).plan(cells_of(part), 1, print)[0].job(Execution())
        for name in ("paused", "whole")
    ]
    quiet = Console(quiet=True)
    late = replace(jobs[0], seconds=100.0)
    follow_jobs([late], Limits(deadline=time.time() + 50), quiet)
    assert not jobs[0].folder.exists()  # no time for a round
    follow_jobs([jobs[0]], Limits(deadline=time.time() + 0.01), quiet)
    if jobs[0].folder.exists():  # it had begun
        assert len((jobs[0].folder / "rounds.jsonl").read_text().splitlines()) == 1
        assert not (jobs[0].folder / "summary.json").exists()
    for job in jobs:
        follow_jobs([job], Limits(), quiet)
    assert (jobs[0].folder / "model.safetensors").read_bytes() == (jobs[1].folder / "model.safetensors").read_bytes()


def test_a_cell_that_another_process_runs_is_left_to_it(part: PaperPart, fedsieve: CommandLine, tmp_path: Path) -> None:
    with locked_directory(tmp_path / "runs" / "flash_table2-1-seed0"):
        err = fedsieve("reproduce", "flash", "table2", "--seeds", "1", "--out", str(tmp_path), code=2).stderr
    assert "1 of 2 runs failed" in err
    assert [path.name for path in (tmp_path / "flash" / "results").iterdir()] == ["flash_table2-2-seed0.json"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("nobody", "table1"), "there is no paper 'nobody': choose zerofl, flash, sparsefedpp"),
        (("flash", "table9"), "FLASH has no 'table9' of whole runs: choose table2, table3, table4, figure1"),
        (("flash", "table2", "--rows", "99"), "flash table2 has no row 99: its rows are 1 to 49"),
        (("flash", "table2", "--rows", "x"), "--rows must be numbers, such as 16,17"),
        (("flash", "table2", "--rows", ","), "--rows must be numbers, such as 16,17"),
        (("flash", "table2", "--authors", "--subset"), "--authors and --subset are two variants of a row"),
        (("flash", "table2", "--table", "md", "--rows", "1"), "--table lays out all that is there"),
        (("flash", "table2", "--to", "x.svg"), "--to is where a table or a figure is written"),
        (("flash", "figure1", "--to", "no/such/x.svg"), "no/such"),
        (("flash", "--rows", "1"), "--rows needs a table"),
        (("flash", "table2", "--seeds", "0"), "--seeds must be at least 1"),
        (("flash", "table2", "--jobs", "0"), "--jobs must be at least 1"),
        (("flash", "table2", "--hours", "0"), "--hours must be a positive number"),
        (("flash", "table2", "--table", "pdf"), "--table must be one of md, html, tex"),
        (("flash", "table2", "--kernels", "fast"), "unknown kernels 'fast'"),
        (("zerofl", "table3", "--authors"), "no public code is known that runs zerofl table3 in another way"),
        (("flash", "figure1"), "no run of flash figure1 is there yet"),
        (("flash", "figure2"), "no run of flash figure2_mnist is there yet"),
    ],
)
def test_what_cannot_be_is_one_line(words: tuple[str, ...], line: str, fedsieve: CommandLine, tmp_path: Path) -> None:
    assert line in fedsieve("reproduce", *words, "--out", str(tmp_path / "out"), code=2).stderr
    assert not (tmp_path / "out").exists()


def test_data_that_are_not_the_rows_are_refused_or_run_as_a_subset(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(LackingData, match="flash_table2/14 cannot run: "):
        Datasets(tmp_path).check(cells_of(find_part("flash", "table2"), [14])[0])
    data = Data(torch.zeros(80, 1, 28, 28), torch.arange(80) % 62)
    some = Dataset("femnist", data, data, 62, torch.arange(80) % 40, tuple(map(str, range(40))), "40 writers")
    monkeypatch.setattr(plan, "read_dataset", lambda task, root: some)
    [cell] = cells_of(find_part("flash", "table2"), [46])
    with pytest.raises(LackingData, match=r"40 writers, not 3,400 writers, .* or run on what is there \(--subset\)"):
        Datasets(None).check(cell)
    subset = Datasets(None).subset(cell)
    assert (subset.variant, subset.run.task.clients) == ("subset", 40)
    assert result_path(Path(), subset, 0).name == "flash_table2-46-subset-seed0.json"


def test_results_of_a_later_arithmetic_are_stale(
    part: PaperPart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [first, _] = Reproduction(tmp_path, Datasets(None)).plan(cells_of(part), 1, print)
    follow_jobs([first.job(Execution())], Limits(), Console(quiet=True))
    keep_result(tmp_path, first.cell, 0, first.folder)
    assert [one.stale for one in row_results(tmp_path, part, [0])] == [False, False]
    assert '"arithmetic": 1' in (first.folder / "run.json").read_text()
    monkeypatch.setattr("fedsieve.runs.reproduction.results.arithmetic_version", lambda recipe: 2)
    assert [one.stale for one in row_results(tmp_path, part, [0])] == [True, False]


@pytest.mark.parametrize("recipe", ["pdst.digits", "zerofl.digits", "nst.digits", "flash.digits"])
def test_an_estimate_is_within_a_factor_of_1_3(recipe: str, one_thread: None) -> None:
    """In processor seconds; the best of twelve pairs, for others on the machine slow a process as well."""
    run = load_recipe(recipe, ["rounds=12", "evaluate_every=12"])
    federation = open_run(run)
    examples, tests = examples_of(run, federation.dataset), len(federation.dataset.test)
    ratios = []
    for _ in range(12):
        cost = measure_cost(federation, own_kernels(federation))
        spent = sum(round.cpu_seconds for round in rounds(federation, local(kernels=cost.kernels)))
        ratios.append((cost.seconds(run, examples, tests) - START) / spent)
        if 1 / 1.3 < ratios[-1] < 1.3:
            return
    pytest.fail(f"estimates are {ratios} times what was spent")


def test_a_watched_engine_tells_of_every_answer() -> None:
    run = load_recipe("fedavg.digits", SHORT)
    answers = list[tuple[int, int, int]]()
    plain = [r.metrics for r in rounds(open_run(run), local())]
    assert [r.metrics for r in rounds(open_run(run), watched(local(), lambda *one: answers.append(one)))] == plain
    assert answers == [(t, n, 2) for t in (1, 2, 3) for n in (1, 2)]


def test_a_long_round_tells_of_its_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clients = ClientProgress()
    clients.console = Console(record=True, width=80)
    for answers in (1, 2, 3, 4):
        now += 40
        clients.answer(7, answers, 4)
    assert clients.console.export_text() == "round 7: 2 of 4 clients\n"
    clients.answer(8, 1, 4)
    assert clients.__rich__() == ""
    now += 3
    assert clients.__rich__() == "round 8: 1 of 4 clients"


def test_a_learning_rate_that_diverges_at_once_is_timed() -> None:
    """Of the same few examples again and again: no update is refused for its length."""
    cost = measure_cost(open_run(tiny_run(FedAvg(), lr=1e6, lr_end=1e6)), "dense")
    assert 0 < cost.client + cost.example < 10
