"""``fedsieve export``: the deployed model as ONNX, as a compact sparse file, or as plain safetensors.

The ONNX graph takes raw examples, an input called ``input`` of shape [batch, *shape] and any batch: the normalisation
is a part of it. Its output ``logits`` is [batch, classes]. ONNX and safetensors hold the zeros too.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.filesize import decimal
from safetensors.torch import save as safetensors
from torch import Tensor, nn

from fedsieve.data.storage import check_output, write_output
from fedsieve.runs.model import TrainedModel, encode_model
from fedsieve.types import InputError, clone_shared
from fedsieve.types.errors import package


def check_export_path(out: Path) -> None:
    """Raise InputError unless a model can be written to ``out``, where no file may be yet."""
    if out.suffix not in FORMATS:
        raise InputError(f"{out}: a model is exported as .onnx, .fsv (compact, sparse) or .safetensors: end it so")
    check_output(out, f"model{out.suffix}")
    if out.exists():
        raise InputError(f"{out} is there already: remove it, or choose another name")


def export(model: TrainedModel, out: Path) -> str:
    """Write the model to ``out`` in the form that its suffix names; return in one line what was written."""
    check_export_path(out)
    content = FORMATS[out.suffix](model)
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

    def forward(self, input: Tensor) -> Tensor:
        """Raw examples [n, *shape] -> logits [n, classes]."""
        logits: Tensor = self.network(self.normalize(input))
        return logits


def _onnx(model: TrainedModel) -> bytes:
    onnx = package("onnx", "onnx")
    package("onnxscript", "onnx")
    example = torch.zeros(2, *model.metadata.shape)
    try:
        with _quiet():
            program = torch.onnx.export(
                _Raw(model).eval(),
                (example,),
                dynamo=True,
                input_names=["input"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
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
