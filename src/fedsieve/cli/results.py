"""The commands that look and use: doctor, list, report, figure, predict and export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsieve.cli.options import DataDir

Model = Annotated[Path, typer.Argument(help="A run directory, or a .fsv file.", metavar="RUN_DIR")]
Own = Annotated[str, typer.Option("--recipe", help="For a network or data of your own: the file.py:function that ran.")]


def doctor_command() -> None:
    """Look for what bites users of Flower and Ray: a line each, exit code 1 if something is to be mended."""
    from fedsieve.cli.doctor import examine

    found = list(examine())
    for finding in found:
        typer.echo(f"{finding.level}  {finding.line}")
    raise typer.Exit(int(any(finding.level == "mend" for finding in found)))


def list_command(
    what: Annotated[
        str, typer.Argument(help="methods, recipes, datasets, engines, or all of them; or published.")
    ] = "all",
    data: DataDir = None,
) -> None:
    """Show the methods, recipes, datasets (and where they were found) and engines; or the papers' published rows."""
    from fedsieve.cli.listing import show_catalogue
    from fedsieve.data import root_from

    show_catalogue(what, root_from(data))


def report_command(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.", metavar="RUN_DIR...")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The page to write.")] = Path("report.html"),
) -> None:
    """Make one self-contained page of one or more runs."""
    from fedsieve.report import report

    report(runs, out)
    typer.echo(f"wrote {out}")


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
    """Say what the deployed model of a run makes of an input.

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


def export_command(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="model.onnx, model.fsv (sparse) or model.safetensors.")],
    recipe: Own = "",
) -> None:
    """Write the deployed model of a run as ONNX, as a compact sparse file, or as safetensors.

    The ONNX graph takes raw examples (images: 0 to 1), since it normalises them itself.

    A .fsv leaves the zeros out, and `fedsieve predict model.fsv INPUT` needs no run directory.
    """
    from fedsieve.runs.export import check_export_path, export
    from fedsieve.runs.model import open_model

    check_export_path(out)
    typer.echo(export(open_model(model, recipe), out))
