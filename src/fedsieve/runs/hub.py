"""A model as a folder for a hub: weights, a card, what it takes and gives, and a loader without FedSieve.

model.safetensors   the plain PyTorch state, zeros included
config.json         the network's name, inputs, classes, normalisation, density
README.md           a model card with YAML front matter
load.py             rebuilds the network by torch and safetensors alone
network.py          the source of the network, where it is one of FedSieve's
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from safetensors.torch import save
from torch import nn

from fedsieve.client.models import MODELS
from fedsieve.client.vector_models import VECTOR_MODELS
from fedsieve.data.storage import write_output
from fedsieve.runs.model import TrainedModel
from fedsieve.types import InputError, clone_shared

HEAD = '''"""The network whose weights are in model.safetensors: FedSieve's source, which needs torch alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
'''
LOADER = '''"""The model, by torch and safetensors alone: load()(normalize(x)) are its logits for raw x [n, *shape]."""
import json
from pathlib import Path
import torch
from safetensors.torch import load_file
FOLDER = Path(__file__).parent
CONFIG = json.loads((FOLDER / "config.json").read_text())

def normalize(x):
    mean, std = (torch.tensor(CONFIG[n]).view(-1, *[1] * (x.dim() - 2)) for n in ("mean", "std"))
    if x.dtype != torch.uint8 and not x.is_floating_point():
        return x
    return (x.float() / (255 if x.dtype == torch.uint8 else 1) - mean) / std

def load(model=None):
    if model is None:
        import network
        model = getattr(network, CONFIG["class"])(CONFIG["channels"], CONFIG["outputs"])
    model.load_state_dict(load_file(FOLDER / "model.safetensors"))
    return model.eval()
'''


def check_hub_folder(out: Path) -> None:
    """Raise InputError unless a folder can be made at ``out``, where nothing may be yet."""
    if out.exists():
        raise InputError(f"{out} is there already: remove it, or choose another name")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent} is not a folder: create it, or choose another place")


def write_hub_folder(model: TrainedModel, out: Path, summary: dict[str, Any] | None = None) -> str:
    """Write the folder of a model, with what its run's ``summary`` says; return in a line what was written."""
    check_hub_folder(out)
    built_in = (MODELS | VECTOR_MODELS).get(model.metadata.network)
    files = {
        "model.safetensors": save(clone_shared(model.weights()), {"format": "pt"}),
        "config.json": (json.dumps(_config(model, built_in), indent=2) + "\n").encode(),
        "README.md": _card(model, summary or {}, built_in is not None).encode(),
        "load.py": LOADER.encode(),
    }
    if built_in:
        files["network.py"] = _source(type(model.network)).encode()
    try:
        out.mkdir()
    except OSError as error:
        raise InputError(f"{out} cannot be made ({error.strerror}): choose another place") from None
    for name, content in files.items():
        write_output(out / name, content)
    size = decimal(sum(map(len, files.values())))
    return f"wrote {out}: {', '.join(files)}, {size} (density {model.density():.1%})"


def _config(model: TrainedModel, built_in: object) -> dict[str, Any]:
    metadata = model.metadata
    config: dict[str, Any] = {
        "library_name": "fedsieve",
        "model": metadata.network,
        "recipe": metadata.recipe,
        "version": metadata.version,
        "classes": metadata.classes,
        "shape": metadata.shape,
        "mean": metadata.mean,
        "std": metadata.std,
        "density": model.density(),
        "run": metadata.run,
    }
    if built_in:
        channels = metadata.shape[0] if metadata.shape else 1
        own = {"class": type(model.network).__name__, "channels": channels, "outputs": max(1, len(metadata.classes))}
        config |= own
    return config


def _source(kind: type[nn.Module]) -> str:
    """Return the source of the networks in the module of ``kind``, whole: they use one another."""
    module = sys.modules[kind.__module__]
    kinds = [one for one in vars(module).values() if isinstance(one, type) and one.__module__ == module.__name__]
    return "\n\n".join([HEAD, *(inspect.getsource(one) for one in kinds if issubclass(one, nn.Module))])


def _card(model: TrainedModel, summary: dict[str, Any], built_in: bool) -> str:
    metadata = model.metadata
    run = metadata.run
    method = str(summary.get("method") or run.get("compress", run.get("method", {})).get("kind", "one-shot pruning"))
    accuracy, own = summary.get("accuracy"), summary.get("density_of_policy")
    front = ["library_name: fedsieve", "tags:", "- federated-learning", "- sparse", f"- {json.dumps(method)}"]
    if metadata.dataset:
        front += ["datasets:", f"- {json.dumps(metadata.dataset)}"]
    if accuracy is not None:
        front += ["metrics:", "- accuracy"]
    rows = {
        "method": method,
        "recipe": metadata.recipe,
        "network": metadata.network,
        "data": metadata.dataset or "not said",
        "classes": len(metadata.classes),
        "density of all weights": f"{model.density():.2%}",
        "density of the policy's weights": "not said" if own is None else f"{own:.2%}",
        "accuracy on the test set": "not measured" if accuracy is None else f"{accuracy:.2%}",
    }
    rows |= {
        f"bytes sent {way}, all rounds": f"{int(summary[name]):,}"
        for way, name in (("up", "bytes_up"), ("down", "bytes_down"))
        if name in summary
    }
    table = [f"| {name} | {str(value).replace('|', '/')} |" for name, value in rows.items()]
    call = "load()" if built_in else "load(YourNetwork())"
    code = f"from load import load, normalize\n\nlogits = {call}(normalize(x))"
    title = f"# {metadata.network}, {method}"
    what = (
        f"`x` are raw examples, `[n, {', '.join(map(str, metadata.shape))}]`; torch and safetensors are all it needs."
    )
    lines = "\n".join(["| | |", "|---|---|", *table])
    parts = [title, lines, "## How to load", f"In this folder:\n\n```python\n{code}\n```"]
    return "\n".join(["---", *front, "---", ""]) + "\n" + "\n\n".join([*parts, what]) + "\n"
