"""``fedsieve export`` and ``fedsieve compress``: the model of a run, as it is or pruned, as a file or a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import typer

from fedsieve.engine.initial import InitialWeights
from fedsieve.engine.models import resolve_model
from fedsieve.recipes import load_model
from fedsieve.runs.compression import compress
from fedsieve.runs.export import check_export_path, export, quantization_cost
from fedsieve.runs.hub import check_hub_folder, write_hub_folder
from fedsieve.runs.model import load_test_set, open_model
from fedsieve.runs.record import read_summary
from fedsieve.types import InputError


def compress_to(out: Path, weights: Path, model: str, shape: str, recipe: str, **how: Any) -> None:
    """Prune ``weights`` of the user's ``model``, or of a run, as ``how`` says, and export them. Raises InputError."""
    check_export_path(out)
    sizes = [size.strip() for size in shape.split(",") if size.strip()]
    if not all(size.isdecimal() for size in sizes):
        raise InputError(f"--shape must be whole numbers, such as 3,32,32, got {shape!r}")
    if model:
        network = InitialWeights.of(weights).load_(resolve_model(load_model(model)), partial=False)
        compressed = compress(network, shape=[*map(int, sizes)], **how)
    elif weights.suffix == ".safetensors":
        raise InputError(f"{weights} does not say of which model it is: name it, --model FILE.py:FUNCTION")
    else:
        compressed = compress(open_model(weights, recipe), **how)
    typer.echo(compressed.line())
    typer.echo(export(compressed, out))


def export_to(out: Path, path: Path, to: str, weights: str, recipe: str, data: str | None) -> None:
    """Write the model at ``path``, a run directory or .fsv, as a file, or ``to`` a hub-folder. Raises InputError."""
    if to not in ("file", "hub-folder"):
        raise InputError(f"--to must be file or hub-folder, got {to!r}")
    if to == "hub-folder":
        check_hub_folder(out)
        if weights != "float32":
            raise InputError(f"--weights {weights} is of ONNX alone: leave it out for a hub-folder")
        summary = read_summary(path) if path.is_dir() else None
        typer.echo(write_hub_folder(open_model(path, recipe), out, summary))
        return
    check_export_path(out, weights)
    model = open_model(path, recipe)
    if weights == "int8":
        typer.echo(quantization_cost(model, recipe, data))
    own = recipe and out.suffix == ".onnx" and "kind" in model.metadata.run["task"]
    examples = load_test_set(model.metadata, recipe, data).subset(torch.arange(2)).x if own else None
    line = export(model, out, weights, examples)
    summary = read_summary(path) if path.is_dir() else None
    if summary and (density := summary.get("density_of_policy")) is not None:
        line += f", {density:.1%} of those that the policy names"
    typer.echo(line)
