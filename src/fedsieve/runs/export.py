"""``fedsieve export``: the deployed model as ONNX, as a compact sparse file, or as plain safetensors.

The ONNX graph takes raw examples, an input called ``input`` of shape [batch, *shape] and any batch: the normalisation
is a part of it. Its output ``logits`` is [batch, classes]. Safetensors hold the zeros too.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from rich.filesize import decimal
from safetensors.torch import save as safetensors
from torch import Tensor, nn

from fedsieve.client.evaluation import accuracy
from fedsieve.data.storage import check_output, write_output
from fedsieve.runs.compact_graph import SMALLEST, check_weights, compact_, dequantize
from fedsieve.runs.model import TrainedModel, encode_model, load_test_set
from fedsieve.types import Examples, InputError, apply_model, clone_shared, logits_of, map_examples
from fedsieve.types.errors import package


def quantized(model: TrainedModel) -> TrainedModel:
    """Return the model with every weight of two or more dimensions as int8 numbers stand for it."""
    network = copy.deepcopy(model.network)
    for name, value in network.named_parameters():
        if value.dim() >= 2 and value.dtype == torch.float32 and value.numel() >= SMALLEST:
            network.get_parameter(name).data = dequantize(value)
    return replace(model, network=network)


def quantization_cost(model: TrainedModel, recipe: str = "", data: str | None = None) -> str:
    """Return in one line the accuracy on the run's test set in float32, and with int8 weights."""
    if "dataset" not in model.metadata.run["task"]:
        return "accuracy with int8 weights: not measured, since this model names no test set"
    test = load_test_set(model.metadata, recipe, data)
    if not model.metadata.classes or not isinstance(test.y, Tensor) or test.y.dim() != 1:
        return "accuracy with int8 weights: not measured, since the test set has no classes"
    before, after = (accuracy(one.network, test) for one in (model, quantized(model)))
    return f"accuracy {before:.2%} in float32, {after:.2%} with int8 weights, of {len(test)} test examples"


def check_export_path(out: Path, weights: str = "float32") -> None:
    """Raise InputError unless a model can be written to ``out``, where no file may be yet."""
    check_weights(weights)
    if weights != "float32" and out.suffix != ".onnx":
        raise InputError(f"--weights {weights} is of ONNX alone: name a model.onnx, not {out.name}")
    if out.suffix not in FORMATS:
        raise InputError(f"{out}: a model is exported as .onnx, .fsv (compact, sparse) or .safetensors: end it so")
    check_output(out, f"model{out.suffix}")
    if out.exists():
        raise InputError(f"{out} is there already: remove it, or choose another name")


def export(model: TrainedModel, out: Path, weights: str = "float32", examples: Examples | None = None) -> str:
    """Write the model to ``out`` in the form that its suffix names; return in one line what was written.

    ``weights``: float32, or in ONNX int8, which ``quantized`` says what it answers. ``examples``: two raw inputs or
    more, for ONNX of a model that takes integers, or several tensors by name, whose names its inputs then have. Raises
    InputError.
    """
    check_export_path(out, weights)
    content = _onnx(model, weights, examples) if out.suffix == ".onnx" else FORMATS[out.suffix](model)
    write_output(out, content)
    dense = model.dense_bytes()
    return (
        f"wrote {out}: {decimal(len(content))}, {len(content) / dense:.1%} of the dense tensors' {decimal(dense)} "
        f"(density {model.density():.1%})"
    )


class _Raw(nn.Module):
    """The model behind its normalisation."""

    def __init__(self, model: TrainedModel):
        super().__init__()
        self.network, self.normalize = model.network, model.normalize

    def forward(self, inputs: Examples) -> Tensor:
        """Raw examples [n, *shape], or several tensors by name -> logits [n, classes]."""
        return logits_of(apply_model(self.network, map_examples(self.normalize, inputs)))


def _onnx(model: TrainedModel, weights: str = "float32", examples: Examples | None = None) -> bytes:
    onnx = package("onnx", "onnx")
    package("onnxscript", "onnx")
    examples = torch.zeros(2, *model.metadata.shape) if examples is None else examples
    if isinstance(examples, tuple):
        raise InputError("ONNX names inputs: give several by name, as a dictionary, or export as .fsv or .safetensors")
    batch = {0: torch.export.Dim("batch")}
    names = ["input"] if isinstance(examples, Tensor) else [*examples]
    try:
        with _quiet():
            program = torch.onnx.export(
                _Raw(model).eval(),
                (
                    map_examples(lambda one: one[:2], examples),
                    {},
                ),  # of the last, a dictionary, it makes named arguments
                dynamo=True,
                input_names=names,
                output_names=["logits"],
                dynamic_shapes=(batch if isinstance(examples, Tensor) else dict.fromkeys(names, batch),),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        cause = str(error.__cause__ or error).strip().split("\n")[0]
        raise InputError(f"ONNX cannot express this model ({cause}): export it as .fsv or .safetensors") from None
    assert program is not None
    graph = program.model_proto
    if not graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise InputError("this model's graph takes one size of batch only: export it as .fsv or .safetensors")
    for part in (graph.graph, *graph.graph.node, *graph.graph.input, *graph.graph.output, *graph.graph.value_info):
        del part.metadata_props[:]  # file names and lines of this machine, of no use elsewhere
    compact_(graph.graph, weights)
    metadata = model.metadata
    properties = {
        "recipe": metadata.recipe,
        "density": f"{model.density():.6g}",
        "classes": json.dumps(metadata.classes),
        "metadata": metadata.json(),
    }
    onnx.helper.set_model_props(graph, properties)
    content: bytes = graph.SerializeToString()
    return content


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks on itself from the user."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


FORMATS: dict[str, Callable[[TrainedModel], bytes]] = {
    ".onnx": _onnx,
    ".fsv": lambda model: encode_model(model.metadata, model.weights()),
    ".safetensors": lambda model: safetensors(clone_shared(model.weights())),
}
