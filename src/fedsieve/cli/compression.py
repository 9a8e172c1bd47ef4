"""``fedsieve compress``: weights of a file, or the model of a run, pruned and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from fedsieve.engine.federation import resolve_model
from fedsieve.engine.initial import InitialWeights
from fedsieve.recipes import load_model
from fedsieve.runs.compression import compress
from fedsieve.runs.export import check_export_path, export
from fedsieve.runs.model import open_model
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
