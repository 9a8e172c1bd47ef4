"""The papers' tables: every row is a run of its own, at the settings that the papers state, with its protocol."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from fedsieve.cli.listing import show_catalogue
from fedsieve.engine import Run
from fedsieve.methods import FLASH, NST, PDST, FedAvg, HeteroFLASH, SparseFedPP, TopK, ZeroFL
from fedsieve.recipes import load_recipe
from fedsieve.recipes.papers import Published, authors_by_method, published, rows_by_protocol
from fedsieve.recipes.papers.protocol import Reading
from fedsieve.runs.sweep.grid import grid
from fedsieve.server.aggregate import Adam, Average

TABLES = {
    "zerofl_table1": 90,
    "zerofl_table2_fedadam": 20,
    "zerofl_table3": 40,
    "flash_table2": 49,
    "zerofl_fig1": 2,
    "flash_table3": 10,
    "flash_table4": 7,
    "sparsefedpp_fig1": 63,
}


def table(name: str) -> list[Published]:
    return [row for row in published() if row.table == name]


def test_every_row_of_every_file_is_there() -> None:
    assert {name: len(table(name)) for name in TABLES} == TABLES
    assert len(published()) == sum(TABLES.values()) == 152 + 66 + 63
    assert len({row.name for row in published()}) == len(published())
    assert all(0 < row.accuracy < 100 for row in published())


@pytest.mark.parametrize("name", TABLES)
def test_no_two_rows_of_a_table_are_the_same_run(name: str) -> None:
    runs = [row.run() for row in table(name)]
    assert all(run != other for i, run in enumerate(runs) for other in runs[:i])


def test_a_row_that_is_printed_twice_is_the_same_run() -> None:
    firsts = [(row, row.run()) for row in (*table("zerofl_table1"), *table("flash_table2"))]
    for row in table("flash_table3"):
        same = next(first for first, run in firsts if run == row.run())
        assert (same.accuracy, same.std, same.protocol) == (row.accuracy, row.std, row.protocol)
        assert row.quoted == ("zerofl_table1" if same.table == "zerofl_table1" else "")


def test_rows_of_different_papers_are_different_runs() -> None:
    runs = [row.run() for row in published() if row.table not in ("flash_table3", "zerofl_table3")]
    assert all(run != other for i, run in enumerate(runs) for other in runs[:i])


def shared(run: Run) -> tuple[object, ...]:
    task = run.task
    return (
        task.dataset,
        task.model,
        task.clients,
        run.per_round,
        run.rounds,
        run.epochs,
        run.batch,
        run.lr,
        run.lr_end,
    )


def zerofl(name: str) -> Iterator[tuple[Published, Run, ZeroFL]]:
    for row in table(name):
        run = row.run()
        assert isinstance(run.method, ZeroFL)
        assert (run.momentum, run.weight_decay, run.seed, run.evaluate_every) == (0, 0, 0, 1)
        yield row, run, run.method


CIFAR = ("cifar10", "resnet18", 100, 10, 700, 1, 16, 0.1, 0.01)
SPEECH = ("speech_commands", "resnet18", 100, 10, 300, 1, 16, 0.01, 0.001)
FEMNIST = ("femnist", "leaf_cnn", 3597, 35, 1000, 1, 16, 0.004, 0.001)


def test_zerofls_first_table() -> None:
    for _, run, method in zerofl("zerofl_table1"):
        assert shared(run) == {"cifar10": CIFAR, "speech_commands": SPEECH, "femnist": FEMNIST}[str(run.task.dataset)]
        assert method.server == Average()
        assert run.task.partition in (("group",) if run.task.dataset == "femnist" else ("lda:1000", "lda:1.0"))
    ((row, run, method),) = [
        (row, run, method) for row, run, method in zerofl("zerofl_table1") if row.accuracy == 73.03 and row.std == 0.32
    ]
    assert (method.sparsity, method.r_mask, method.upload) == (0.95, 0.1, "diff_of_top")
    assert (run.task.dataset, run.task.partition, row.upload_mb) == ("cifar10", "lda:1.0", 14.4)
    assert row.command == (
        "fedsieve run zerofl.cifar10_niid -s method.sparsity=0.95 -s method.upload=diff_of_top -s method.r_mask=0.1"
    )


def test_zerofls_other_tables() -> None:
    for row, run, method in zerofl("zerofl_table2_fedadam"):
        assert (shared(run), run.task.partition, row.std) == (CIFAR, "lda:1.0", None)
        assert method.server == Adam()
    for _, run, method in zerofl("zerofl_table3"):
        assert shared(run) == SPEECH
        assert method.server == Average()
    assert {method.upload for _, _, method in zerofl("zerofl_table3")} == {
        "full",
        "top_weights",
        "diff_of_top",
        "top_diff",
    }


FLASHS = {
    "mnist": ("mnist", "mnist_net", 100, 10, 400, 1, 32, 0.1, 0.001),
    "cifar10": ("cifar10", "resnet18", 100, 10, 600, 1, 16, 0.1, 0.001),
    "femnist": ("femnist", "leaf_cnn", 3400, 34, 1000, 1, 16, 0.1, 0.001),
}


@pytest.mark.parametrize("name", ["flash_table2", "flash_table3", "flash_table4"])
def test_flashs_tables(name: str) -> None:
    for row in table(name):
        if row.quoted:
            continue
        run = row.run()
        dataset = str(run.task.dataset)
        assert shared(run) == FLASHS[dataset]
        assert (run.momentum, run.weight_decay) == (0, 0)
        assert run.task.augment == ("crop_flip" if dataset == "cifar10" else "none")
        assert run.task.partition in (("group",) if dataset == "femnist" else ("lda:1000", "lda:1.0", "lda:0.1"))
        assert run.task.tiers == ((0.4, 0.3, 0.3) if name == "flash_table4" else (1.0,))


def test_flashs_methods() -> None:
    kinds = [type(row.run().method) for row in table("flash_table2")[:7]]
    assert kinds == [FedAvg, NST, PDST, FLASH, NST, PDST, FLASH]
    assert {row.run().method for row in table("flash_table4") if "femnist" not in row.recipe} == {HeteroFLASH()}
    (row,) = [row for row in table("flash_table2") if row.accuracy == 75.47]
    run = row.run()
    assert (run.method, run.task.partition, row.std) == (FLASH(density=0.05), "lda:0.1", 2.31)
    assert row.command == "fedsieve run flash.cifar10_niid -s task.partition=lda:0.1 -s method.density=0.05"


def test_sparsefedpps_figure() -> None:
    for row in table("sparsefedpp_fig1"):
        run = row.run()
        assert shared(run) == ("cifar10", "resnet18", 100, 10, 700, 1, 16, 0.5, 0.01)
        assert (run.momentum, run.weight_decay, run.task.augment) == (0, 1e-3, "none")
        assert row.variant == isinstance(run.method, ZeroFL | FLASH)
    methods = [row.run().method for row in table("sparsefedpp_fig1") if row.run().task.partition == "lda:0.1"]
    assert methods[0] == FedAvg()
    assert methods[3:5] == [TopK(sparsity=0.99), TopK(sparsity=0.995)]
    assert methods[6] == ZeroFL(sparsity=0.9, r_mask=0)
    assert methods[12:14] == [SparseFedPP(sparsity=0.95), SparseFedPP(sparsity=0.99)]
    assert methods[-1] == FLASH(density=0.001)


def test_flashs_third_table_saves_what_it_prints() -> None:
    saved = [(row.recipe.split(".")[0], row.savings_down, row.savings_up) for row in table("flash_table3")]
    assert saved == [
        *[("zerofl", 1, 1.6), ("flash", 9.8, 9.8), ("zerofl", 1, 1.9), ("flash", 19.5, 19.5)] * 2,
        ("zerofl", 1, 17.7),
        ("flash", 14.6, 14.6),
    ]


def test_zerofls_savings_are_its_file_sizes() -> None:
    for row in published():
        if row.upload_mb and row.savings_up and not row.quoted:
            dense = 23.0 if row.run().task.dataset == "femnist" else 43.7
            assert row.savings_up == pytest.approx(dense / row.upload_mb, abs=0.06)


def test_what_is_read() -> None:
    readings = {name: {row.reading for row in table(name)} for name in TABLES}
    assert readings["zerofl_table3"] == {Reading("best")}
    assert readings["zerofl_table1"] == {Reading(), Reading("at", 200)}
    assert {row.run().task.dataset for row in table("zerofl_table1") if row.reading.kind == "at"} == {"speech_commands"}
    assert readings["zerofl_fig1"] == {Reading(data="validation")}
    assert {reading for name in TABLES if name[:6] != "zerofl" for reading in readings[name]} == {Reading()}
    assert [Reading(kind, 200).evaluate_every(300) for kind in ("last", "at", "best")] == [300, 200, 1]


TERMS = [
    *("data", "hold_out", "partition", "clients", "model", "initialisation", "normalisation", "augmentation"),
    *("optimiser", "momentum", "weight_decay", "batch", "epochs", "learning_rate", "server", "rounds", "reading"),
    "seeds",
]


@pytest.mark.slow
def test_every_row_is_a_complete_protocol() -> None:
    for row in published():
        assert [*row.protocol] == TERMS
        assert all(row.protocol.values())
        assert {*row.says.not_printed, *row.says.remarks} <= {*TERMS}


def test_what_a_paper_does_not_print_is_said_with_what_was_chosen() -> None:
    cifar, speech, femnist = (table("zerofl_table1")[i].protocol for i in (0, 40, 80))
    assert cifar["batch"] == "not printed: 16"
    assert cifar["hold_out"] == "10% of every client's training examples"
    assert speech["data"].startswith("Speech Commands v0.01, 12 classes, 32x32 MFCC: 56,196 training clips")
    assert speech["rounds"].startswith("not printed: 300")
    assert speech["reading"] == "test accuracy, in round 200"
    assert femnist["clients"] == "3,597, 35 a round"
    flash = table("flash_table2")[0].protocol
    assert (flash["batch"], flash["seeds"], flash["rounds"]) == ("32", "3", "400")
    assert flash["hold_out"] == "not printed: nothing (as in the authors' code)"
    assert table("flash_table3")[0].protocol["hold_out"] == cifar["hold_out"]
    sparsefedpp = table("sparsefedpp_fig1")[0].protocol
    assert [term for term in TERMS if not sparsefedpp[term].startswith("not printed")] == ["data", "model"]


def test_the_list_has_every_row_as_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    show_catalogue("published", None)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(published())
    assert all(row.name in line and line.endswith(row.command) for row, line in zip(published(), lines, strict=True))


@pytest.mark.slow
def test_the_list_has_the_protocols(capsys: pytest.CaptureFixture[str]) -> None:
    show_catalogue("papers", None)
    text = capsys.readouterr().out
    assert all(title in text for title in rows_by_protocol())
    assert text.count(" not printed: 16") == sum(
        "not printed: 16" in p["batch"] for p, _ in rows_by_protocol().values()
    )
    assert all(f"{row.name}  {row.printed}  {row.command}" in text for row in published())
    for _, rows in rows_by_protocol().values():
        assert all(f"{names} as the authors' code: ... {own}" in text for names, own in authors_by_method(rows).items())


AUTHORS = {"flash_table2": 42, "flash_table3": 4, "flash_table4": 6, "sparsefedpp_fig1": 15, "zerofl_fig1": 2}
"""How many rows of each table the authors' public code runs otherwise than their paper says."""


def test_the_authors_code_is_another_run_beside_the_rows_own() -> None:
    for name in TABLES:
        rows = [row for row in table(name) if row.authors]
        assert len(rows) == AUTHORS.get(name, 0)
        for row in rows:
            run = load_recipe(row.recipe, (*row.settings, *row.authors))
            assert run != row.run()
            assert row.authors_command == f"{row.command} {' '.join(f'-s {setting}' for setting in row.authors)}"
            assert row.run() == load_recipe(row.recipe, (*row.settings, "evaluate_every=1"))  # the paper's, as ever
    assert not any(row.authors_command for row in published() if not row.authors)


@pytest.mark.parametrize(
    ("row", "method"),
    [
        ("flash_table2/1", FedAvg()),
        ("flash_table2/12", NST(0.05, draw="bernoulli", weighting="equal")),
        ("flash_table2/13", PDST(0.05, draw="bernoulli", weighting="equal")),
        ("flash_table2/14", FLASH(0.05, draw="bernoulli", weighting="equal", excess="clip")),
        ("flash_table4/2", HeteroFLASH(draw="bernoulli", excess="clip", subset="magnitude")),
    ],
)
def test_flashs_public_code_on_mnist(row: str, method: object) -> None:
    (one,) = [other for other in published() if other.name == row]
    run, own = load_recipe(one.recipe, (*one.settings, *one.authors)), one.run()
    assert run.method == method
    assert (run.task.model, run.lr_rounds, run.lr_offset, run.rounds) == ("mnist_net_softmax", 1000, -1, 400)
    assert run.task.tier_by == ("round" if row.startswith("flash_table4") else "client")
    changed = replace(run.task, model="mnist_net", tier_by="client")
    assert changed == own.task  # initial weights, normalisation and batch are the paper's row's
    assert (run.batch, run.lr, run.lr_end) == (own.batch, own.lr, own.lr_end)


def test_flashs_public_code_on_cifar10() -> None:
    (row,) = [row for row in table("flash_table2") if row.accuracy == 75.47]
    run = load_recipe(row.recipe, (*row.settings, *row.authors))
    assert (run.task.initialisation, run.batch, run.task.augment) == ("xavier_uniform", 32, "crop_flip")
    assert run.task.input_mean == (0.4914, 0.4822, 0.4465)
    assert run.task.input_std == (0.2023, 0.1994, 0.2010)
    assert run.method == FLASH(0.05, draw="bernoulli", weighting="equal", excess="clip")


def test_sparsefedpps_public_code() -> None:
    rows = [row for row in table("sparsefedpp_fig1") if row.authors]
    for row in rows:
        method = row.run().method
        assert isinstance(method, SparseFedPP)
        run = load_recipe(row.recipe, (*row.settings, *row.authors))
        assert run.method == replace(method, activations="cached")


def test_swats_public_recipe() -> None:
    for row in table("zerofl_fig1"):
        run, own = load_recipe(row.recipe, (*row.settings, *row.authors)), row.run()
        rates = [run.lr_at(t) for t in (1, 50, 51, 100, 101, 150)]
        assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
        assert (run.momentum, run.weight_decay, run.norm_weight_decay) == (0.9, 5e-4, False)
        assert (run.batch, run.rounds, run.task.augment) == (128, 150, "crop_flip")
        assert run.method == own.method


def test_no_public_code_runs_femnist_or_zerofl() -> None:
    assert not any(row.authors for row in published() if "femnist" in row.recipe or row.recipe.startswith("zerofl"))


def test_a_sweep_takes_the_authors_settings() -> None:
    (row,) = [row for row in published() if row.name == "flash_table4/5"]
    (cell,) = grid([row.recipe], [*row.settings, *row.authors], 1).cells
    assert cell.run == replace(load_recipe(row.recipe, (*row.settings, *row.authors)), seed=cell.run.seed)
