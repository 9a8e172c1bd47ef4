"""The commands, from run to flower; and bench.

Those that run something have a flag for each field of ``Execution`` that concerns them. What a command needs it imports
itself, so that PyTorch is not loaded for a page of help.
"""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fedsieve import __version__
from fedsieve.cli.bench.commands import bench_app
from fedsieve.cli.generate import generate_command
from fedsieve.cli.options import DataDir, Model, Own, with_execution
from fedsieve.runs.execution import Execution

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Sparse federated learning that is sparse for real.",
)
flower_app = typer.Typer(no_args_is_help=True, help="Run FedSieve on SuperLinks and SuperNodes of your own.")
app.add_typer(bench_app, name="bench")
app.add_typer(flower_app, name="flower")

Recipe = Annotated[str, typer.Argument(help="A built-in recipe (fedsieve list recipes) or your file.py:function.")]
Setting = Annotated[list[str] | None, typer.Option("-s", "--set", metavar="NAME=VALUE", help="Change a field.")]
Init = Annotated[
    Path | None,
    typer.Option("--init", help="Weights to start from: .safetensors, .fsv, or a folder with model.safetensors."),
]
Axis = Annotated[
    list[str] | None,
    typer.Option(
        "-s",
        "--set",
        metavar="NAME=V1,V2",
        help="The values of a field; apart by ; where a value has commas itself (quote it: -s 'task.tiers=1;.5,.5').",
    ),
]


def _show_version(show: bool) -> None:
    if show:
        typer.echo(f"fedsieve {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Show warnings of the command that follows in one line each."""
    from fedsieve.client.process import warn_in_one_line

    warn_in_one_line()


@app.command("run")
@with_execution("run")
def run_command(
    context: typer.Context, recipe: Recipe, set_: Setting = None, init: Init = None, *, execution: Execution
) -> None:
    """Run an experiment: live progress, and a directory with rounds, checkpoints, summary and model."""
    from fedsieve.cli.run import start_run

    source = context.get_parameter_source("kernels")
    start = [f"task.init={init.absolute()}"] if init else []
    start_run(recipe, [*(set_ or []), *start], execution, keep_kernels=source is None or source.name == "DEFAULT")


@app.command("sweep")
@with_execution("sweep")
def sweep_command(
    recipes: Annotated[list[str], typer.Argument(help="Recipes, as of `fedsieve run`.", metavar="RECIPE...")],
    set_: Axis = None,
    seeds: Annotated[int, typer.Option(help="How many seeds: 0 to N-1.", metavar="N")] = 3,
    jobs: Annotated[int, typer.Option(help="Runs at once, each a process with one thread.", metavar="N")] = 1,
    table: Annotated[bool, typer.Option("--table", help="Only print the table of what has been run.")] = False,
    *,
    execution: Execution,
) -> None:
    """Run every recipe with every value of every setting and every seed; the same command goes on after a stop.

    A setting of the method (method.density) concerns those recipes whose method has it.
    """
    from fedsieve.runs.sweep.grid import check_grid, check_same_sweep, default_folder, grid, open_folder
    from fedsieve.runs.sweep.jobs import run_sweep
    from fedsieve.runs.sweep.table import show_table
    from fedsieve.types import InputError

    whole = grid(recipes, set_ or [], seeds, execution)
    if jobs < 1:
        raise InputError(f"--jobs must be at least 1 run at once, got {jobs}")
    folder = Path(execution.out) if execution.out else default_folder(whole)
    if table:
        check_same_sweep(folder, whole)
        show_table(whole, folder)
    else:
        check_grid(whole)
        with open_folder(folder, whole):
            trouble = run_sweep(whole.jobs(folder), jobs)
            show_table(whole, folder, save=True)
        if trouble:
            raise InputError(trouble)


@app.command("doctor")
def doctor_command() -> None:
    """Check this machine for Flower, Ray and the kernels: a line each, exit code 1 if something is to be mended."""
    from fedsieve.cli.doctor import examine

    findings = list(examine())
    for finding in findings:
        typer.echo(f"{finding.level}  {finding.line}")
    raise typer.Exit(int(any(finding.level == "mend" for finding in findings)))


@app.command("list")
def list_command(
    what: Annotated[
        str,
        typer.Argument(
            help="methods, recipes, datasets, engines, or all of them; of the papers' rows published, or papers, which "
            "has their protocols."
        ),
    ] = "all",
    data: DataDir = None,
) -> None:
    """Show the methods, recipes, datasets (and where they were found) and engines; or the papers' rows."""
    from fedsieve.cli.listing import show_catalogue
    from fedsieve.data import root_from

    show_catalogue(what, root_from(data))


@app.command("data")
def data_command(
    name: Annotated[str, typer.Argument(help="mnist, cifar10, cifar100, femnist, speech_commands or shakespeare.")],
    archive: Annotated[
        Path | None,
        typer.Option("--from", help="The archive as downloaded, a folder of its files, or what --pack wrote."),
    ] = None,
    pack: Annotated[
        Path | None,
        typer.Option(help="Write what is there as one small file, or FILE.1, FILE.2 of 50 MB each.", metavar="FILE"),
    ] = None,
    data: DataDir = None,
) -> None:
    """Build a dataset in the data folder from its public archive: counted, checked, and whole or not at all.

    The same command goes on after a stop; without an archive it checks what was built, or says what to download.
    """
    from fedsieve.cli.datasets import build_by_name, pack_by_name
    from fedsieve.data import root_from
    from fedsieve.types import InputError

    if pack is None:
        build_by_name(name, archive, root_from(data))
    elif archive:
        raise InputError("--pack writes what is in the data folder: build it first, with --from alone")
    else:
        pack_by_name(name, pack, root_from(data))


@app.command("reproduce")
def reproduce_command(
    paper: Annotated[str, typer.Argument(help="zerofl, flash or sparsefedpp; without it all of them are listed.")] = "",
    part: Annotated[str, typer.Argument(help="table1, figure2 and the like; without it the paper's are listed.")] = "",
    rows: Annotated[str, typer.Option(help="Numbers of rows, by commas (fedsieve list published). Default: all.")] = "",
    seeds: Annotated[int, typer.Option(help="How many seeds: 0 to N-1.", metavar="N")] = 3,
    jobs: Annotated[int, typer.Option(help="Runs at once, each a process with one thread.", metavar="N")] = 1,
    hours: Annotated[
        float | None,
        typer.Option(help="Stop after a round, before so many hours are up. A figure runs its cells only with it."),
    ] = None,
    nice: Annotated[bool, typer.Option("--nice", help="Leave the processor to others who want it.")] = False,
    authors: Annotated[bool, typer.Option("--authors", help="Run it as the authors' public code has it.")] = False,
    subset: Annotated[bool, typer.Option("--subset", help="Run on what is there of a dataset.")] = False,
    table: Annotated[str, typer.Option(help="Only lay out the results that are there: md, html or tex.")] = "",
    to: Annotated[Path | None, typer.Option(help="Where the table (default: print) or the figure is written.")] = None,
    kernels: Annotated[str, typer.Option(help="auto, sparse or dense. Default: what suits the method.")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or cuda:0,1; one run at a time on a GPU.")] = "cpu",
    precision: Annotated[str, typer.Option(help="What PyTorch multiplies in on a GPU: fp32, tf32 or bf16.")] = "fp32",
    data: DataDir = None,
    out: Annotated[Path, typer.Option(help="Where results/ and runs/ are.")] = Path("reproductions"),
) -> None:
    """Run a table or figure of a paper, cell by cell, and lay it out as printed; the same command goes on after a stop.

    What it costs on this machine is said first. A finished cell is never run again.
    """
    from fedsieve.cli.reproduce import Wishes, reproduce

    wishes = Wishes(paper, part, rows, seeds, jobs, hours, nice, authors, subset, table, to)
    reproduce(wishes, out, Execution(device=device, precision=precision, data=data or ""), kernels)


@app.command("report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.", metavar="RUN_DIR...")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The page to write.")] = Path("report.html"),
) -> None:
    """Make one self-contained page of one or more runs."""
    from fedsieve.report import report

    report(runs, out)
    typer.echo(f"wrote {out}")


@app.command("figure")
def figure_command(
    name: Annotated[str, typer.Argument(help="zerofl-1 to -4, flash-1, flash-2 or sparsefedpp-1.")],
    runs: Annotated[list[Path], typer.Argument(help="Run directories.", metavar="RUN_DIR...")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="A .png, .pdf or .svg. Default: NAME.pdf.")] = None,
    layers: Annotated[str, typer.Option(help="For zerofl-2 and -3: the layers to show, A,B,C.")] = "",
) -> None:
    """Draw one of the papers' figures from runs; those that differ only in their seed become one line."""
    from fedsieve.report.figures import write_figure

    out = out or Path(f"{name}.pdf")
    write_figure(name, runs, out, [layer.strip() for layer in layers.split(",") if layer.strip()])
    typer.echo(f"wrote {out}")


@app.command("plot")
def plot_command(
    y: Annotated[str, typer.Argument(help="A column of the rows, such as accuracy or loss; total:bytes_up sums up.")],
    x: Annotated[str, typer.Argument(help="Another, such as round or total:bytes_up; or a setting.")],
    runs: Annotated[list[Path], typer.Argument(help="Run directories.", metavar="RUN_DIR...")],
    by: Annotated[list[str] | None, typer.Option(help="A line for every value of this setting; repeatable.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="A .png, .pdf or .svg. Default: Y-X.png.")] = None,
    log: Annotated[str, typer.Option(help="Powers of ten on x, y or xy.")] = "",
) -> None:
    """Draw any column of runs by any other, or by a setting; seeds are one line, with their standard deviation."""
    from fedsieve.report.columns import write_plot

    out = out or Path(f"{y}-{x}.png".replace(":", "_").replace("/", "_"))
    write_plot(y, x, by or [], runs, out, log)
    typer.echo(f"wrote {out}")


@app.command("predict")
def predict_command(
    model: Model,
    source: Annotated[
        str,
        typer.Argument(
            help="An image, a folder of images, an array (.npy, .npz), a recording (.wav, for speech), or examples of "
            "the run's own test set: test, test:7, test:0-99.",
            metavar="INPUT",
        ),
    ],
    top: Annotated[int, typer.Option(help="How many classes to show.", min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for every example.")] = False,
    batch: Annotated[int, typer.Option(help="Examples at once.", min=1)] = 64,
    kernels: Annotated[str, typer.Option(help="auto, sparse or dense.")] = "auto",
    data: DataDir = None,
    recipe: Own = "",
) -> None:
    """Predict the classes of examples, with their probabilities, by the deployed model of a run.

    Images get the model's channels and size and are never inverted: MNIST is bright on black, FEMNIST black on white.

    Arrays are in the dataset's own units (images: 0 to 1), or uint8, which stands for x / 255.
    """
    from fedsieve.runs.model import open_model
    from fedsieve.runs.prediction import choose_forward, open_examples, predict, print_predictions

    trained = open_model(model, recipe)
    examples = open_examples(source, trained.metadata, recipe, data)
    batch = min(batch, len(examples.names))
    logits, way = choose_forward(trained, batch, kernels)
    typer.echo(f"kernels: {way}", err=True)
    print_predictions(predict(trained, examples, logits, batch, top), as_json)


app.command("generate")(generate_command)


@app.command("export")
def export_command(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="model.onnx, model.fsv (sparse) or model.safetensors.")],
    to: Annotated[
        str, typer.Option(help="file, or hub-folder: with a model card, and a loader without FedSieve.")
    ] = "file",
    weights: Annotated[str, typer.Option(help="float32, or in ONNX int8: the accuracy is measured.")] = "float32",
    data: DataDir = None,
    recipe: Own = "",
) -> None:
    """Write the deployed model of a run as ONNX, as a compact sparse file, or as safetensors.

    The ONNX graph takes raw examples (images: 0 to 1), since it normalises them itself. A .fsv leaves zeros out, and
    `fedsieve predict model.fsv INPUT` needs no run directory.
    """
    from fedsieve.cli.export import export_to

    export_to(out, model, to, weights, recipe, data)


@app.command("compress")
def compress_command(
    weights: Annotated[Path, typer.Argument(help="Weights, as of run --init; or a run directory.", metavar="WEIGHTS")],
    out: Annotated[Path, typer.Option("-o", "--out", help="model.onnx, model.fsv (sparse) or model.safetensors.")],
    density: Annotated[float, typer.Option(help="The share of the policy's weights that is kept.")] = 0.1,
    method: Annotated[str, typer.Option(help="global (one cut over all layers), uniform or erk.")] = "global",
    policy: Annotated[str, typer.Option(help="Which layers are pruned: a policy, or layers by a comma.")] = "all",
    unit: Annotated[int, typer.Option(min=1, help="How many output channels share a pattern.")] = 1,
    model: Annotated[str, typer.Option(help="Your file.py:function or file.py:Class that makes the network.")] = "",
    shape: Annotated[str, typer.Option(help="The shape of one example, such as 3,32,32, for ONNX.")] = "",
    recipe: Own = "",
) -> None:
    """Prune a model that was trained elsewhere, once, by magnitude, and export it; or the model of a run."""
    from fedsieve.cli.export import compress_to

    compress_to(out, weights, model, shape, recipe, density=density, method=method, policy=policy, unit=unit)


@flower_app.callback()
def _group() -> None:
    """Keep `app` a command of its own, though it is the only one."""


@flower_app.command("app")
@with_execution("flower")
def app_command(
    recipe: Recipe,
    folder: Annotated[Path, typer.Argument(help="A new folder.", metavar="DIR")],
    set_: Setting = None,
    *,
    execution: Execution,
) -> None:
    """Write a Flower app that runs a recipe: `flwr run DIR` takes it to a simulation or to a deployment."""
    from fedsieve.flower.app.project import AppConfig, write_app
    from fedsieve.recipes import load_recipe

    settings = set_ or []
    execution.quorum.check(load_recipe(recipe, settings))
    out = str(Path(execution.out or folder / "run").absolute())
    config = AppConfig(**asdict(execution) | {"out": out}, recipe=recipe, settings=shlex.join(settings))
    write_app(folder, config)
    typer.echo(f"wrote {folder}: see {folder / 'README.md'}")
