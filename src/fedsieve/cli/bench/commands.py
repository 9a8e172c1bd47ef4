"""``fedsieve bench``: what sparsity saves on this machine, as a table or as JSON, an object a line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from fedsieve.cli.bench.measurement import Effort, Measurement
    from fedsieve.cli.bench.workload import Workload

Number = TypeVar("Number", int, float)
HEADS = {
    "density_per_multiply_add": "multiply-adds",
    "ms_sparse": "sparse, ms",
    "ms_dense_fp32": "dense, ms",
    "ms_dense_bf16": "bf16, ms",
    "ratio_fp32": "to fp32",
    "ratio_bf16": "to bf16",
    "roof_ms": "roof, ms",
    "share_of_roof": "of roof",
    "gflops": "multiply-adds, Gflop/s",
    "l1_gb_s": "L1, GB/s",
    "l2_gb_s": "L2, GB/s",
    "l3_gb_s": "L3, GB/s",
    "memory_gb_s": "memory, GB/s",
    "peak_mb_sparse": "sparse, MB",
    "peak_mb_dense": "dense, MB",
    "samples_kept": "kept",
    "samples_dropped": "dropped",
}
"""A row's fields as the table names them, where the name itself does not say it."""

PERCENT = ("sparsity", "density_per_multiply_add", "density", "churn", "share_of_roof")

bench_app = typer.Typer(no_args_is_help=True, help="Measure what sparsity saves on this machine.")
Model = Annotated[
    str,
    typer.Option(
        help="resnet18, leaf_cnn, mnist_net (or _softmax), digits_net, lenet5, feddst_net, vit_tiny, char_gpt, linear."
    ),
]
Sparsity = Annotated[str, typer.Option(metavar="S1,S2", help="The share of zeros; a row each.")]
Batch = Annotated[str, typer.Option(metavar="N1,N2", help="Examples in a batch; a row each.")]
Storage = Annotated[str, typer.Option(help="What the sparse activations are kept in: fp32 or bf16.")]
Policy = Annotated[
    str, typer.Option(help="Which layers are sparse (a policy, or layers by a comma). Default: by model.")
]
Budget = Annotated[str, typer.Option(help="How the layers share the density: uniform or erk.")]
Unit = Annotated[int, typer.Option(min=1, help="How many output channels share a frozen mask's pattern.")]
Threads = Annotated[int, typer.Option(min=0, help="0: as many as PyTorch takes.")]
Samples = Annotated[int, typer.Option(min=1, help="Undisturbed samples of every variant.")]
Seconds = Annotated[float, typer.Option(min=0, help="When to stop waiting for them, a row.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


@bench_app.command("step")
def step_command(
    model: Model = "resnet18",
    batch: Batch = "16",
    sparsity: Sparsity = "0.9",
    rule: Annotated[str, typer.Option(help="frozen (one random mask) or swat (its top-k anew).")] = "frozen",
    period: Annotated[int, typer.Option(help="After how many steps swat's thresholds are chosen anew.")] = 1,
    storage: Storage = "fp32",
    policy: Policy = "",
    budget: Budget = "uniform",
    unit: Unit = 1,
    threads: Threads = 0,
    samples: Samples = 7,
    seconds: Seconds = 60.0,
    compiled: Annotated[bool, typer.Option("--compile", help="Try torch.compile for the dense step too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Time whole training steps, sparse against dense PyTorch, and their peak memory."""
    from fedsieve.cli.bench.step import measure_step

    options = {"rule": rule, "storage": storage, "policy": policy, "budget": budget, "unit": unit, "period": period}
    _measure(measure_step, model, batch, sparsity, options, (threads, samples, seconds, compiled), as_json)


@bench_app.command("roof")
def roof_command(threads: Threads = 0, as_json: AsJson = False) -> None:
    """Measure what this machine can do at most: multiply-adds, and reading caches and memory; one and all threads."""
    import torch

    from fedsieve.cli.bench.roof import measure_roof
    from fedsieve.cli.bench.workload import instruction_set
    from fedsieve.kernels import unavailable_reason
    from fedsieve.types import InputError

    if why := unavailable_reason():
        raise InputError(f"the roof is that of the sparse kernels, and there are none here: {why}")
    counts = sorted({1, threads or torch.get_num_threads()})
    _print_rows(map(measure_roof, counts), as_json, f"kernels for {instruction_set()}")


@bench_app.command("infer")
def infer_command(
    model: Annotated[
        str, typer.Option(help="One of `bench step`'s, or a trained one: a run directory, a .fsv, a folder for a hub.")
    ] = "resnet18",
    batch: Batch = "1,16,32",
    sparsity: Annotated[str, typer.Option(metavar="S1,S2", help="The share of zeros; a row each. Default: .95.")] = "",
    storage: Storage = "fp32",
    policy: Policy = "",
    budget: Budget = "uniform",
    unit: Unit = 1,
    threads: Threads = 0,
    samples: Samples = 7,
    seconds: Seconds = 60.0,
    as_json: AsJson = False,
    recipe: Annotated[
        str, typer.Option(metavar="FILE.py:NAME", help="Of a trained network of your own: what makes it.")
    ] = "",
) -> None:
    """Time inference of a pruned network, sparse against dense PyTorch; of a trained one at its own zeros."""
    from fedsieve.cli.bench.inference import measure_inference, sparse_predictor
    from fedsieve.cli.bench.workload import Workload
    from fedsieve.kernels import unavailable_reason
    from fedsieve.sparse.masks import weight_density
    from fedsieve.types import InputError

    options = {"storage": storage, "policy": policy, "budget": budget, "unit": unit, "recipe": recipe}
    if (one := Workload(model, 1, recipe=recipe)).trained:
        if sparsity or policy or budget != "uniform" or unit > 1:
            raise InputError(f"{model} has zeros of its own: leave --sparsity, --policy, --budget and --unit out")
        network = one.network()
        if unavailable_reason() is None and (reason := sparse_predictor(one, network, one.examples()[0]).reason):
            typer.echo(f"fedsieve: only dense PyTorch is measured: {reason}", err=True)
        sparsity = f"{1 - weight_density(network.state_dict()):.4f}"
    elif recipe:
        raise InputError(f"--recipe makes the network of a trained model, and {model} is none: leave it out")
    _measure(measure_inference, model, batch, sparsity or "0.95", options, (threads, samples, seconds), as_json)


@bench_app.command("wire")
def wire_command(
    density: Annotated[str, typer.Option(metavar="D1,D2", help="The share of non-zeros; some rows each.")] = "",
    as_json: AsJson = False,
) -> None:
    """Weigh messages against their entropy, CSR and dense, and time them: a ResNet-18 of drawn weights."""
    from fedsieve.cli.bench import wire
    from fedsieve.types import InputError

    densities = tuple(_numbers("--density", density, float)) if density else wire.DENSITIES
    if not all(0 < d < 1 for d in densities):
        raise InputError(f"--density takes numbers between 0 and 1, not {density!r}")
    _print_rows(map(wire.measure_message, wire.random_messages(densities)), as_json, "1 thread")


def _measure(
    measure: Callable[[Workload, Effort], Measurement],
    model: str,
    batch: str,
    sparsity: str,
    options: dict[str, Any],
    effort: tuple[Any, ...],
    as_json: bool,
) -> None:
    """Measure every batch at every sparsity, and print a row each. Raises InputError for what cannot be measured."""
    import torch

    from fedsieve.cli.bench.measurement import Effort
    from fedsieve.cli.bench.workload import Workload, instruction_set
    from fedsieve.kernels import unavailable_reason

    sizes, shares = _numbers("--batch", batch, int), _numbers("--sparsity", sparsity, float)
    workloads = [Workload(model, n, s, **options) for n in sizes for s in shares]
    for workload in workloads if not workloads[0].trained else ():
        workload.densities(workload.network())  # a policy that fits no layer is refused before the first row
    threads = effort[0] or torch.get_num_threads()
    if why := unavailable_reason():
        typer.echo(f"fedsieve: no sparse kernels here, so only dense PyTorch is measured: {why}", err=True)
    rows = (measure(workload, Effort(threads, *effort[1:])) for workload in workloads)
    _print_rows(rows, as_json, f"{threads} threads, kernels for {instruction_set()}")


def _print_rows(measurements: Iterable[DataclassInstance], as_json: bool, setting: str) -> None:
    """Print measurements: each at once as a JSON object, or a table of all, without the columns that nothing fills."""
    rows = map(asdict, measurements)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row))
        return
    from rich.console import Console
    from rich.table import Column, Table

    from fedsieve.cli.bench.measurement import machine

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 1000)
    console.print(f"{machine()}, {setting}")
    cells = [{name: _format_cell(name, value) for name, value in row.items()} for row in rows]
    names = [name for name in cells[0] if name != "cpu" and any(row[name] != "-" for row in cells)]
    table = Table(*(Column(HEADS.get(name, name.replace("_", " ")), justify="right") for name in names))
    for row in cells:
        table.add_row(*(row[name] for name in names))
    console.print(table)


def _format_cell(name: str, value: object) -> str:
    if isinstance(value, float) and name in PERCENT:
        return f"{100 * value:.3g} %"
    if isinstance(value, float):
        return f"{value:.1f}x" if name.startswith("ratio") else f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return "-" if value is None else str(value)


def _numbers(what: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """Return the numbers that commas separate. Raises InputError."""
    from fedsieve.types import InputError

    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{what} takes a number, or several separated by commas, not {text!r}") from None
