"""A trained model, opened: from a run directory, or from a .fsv file that ``fedsieve export`` wrote.

A network or a dataset of the user's own is code, which neither holds: it comes from the recipe that the user names.
Nothing that a file says is ever imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedsieve.client.models import MODELS
from fedsieve.data import NAMES, Dataset, load_dataset, root_from
from fedsieve.data.storage import read_json, regular
from fedsieve.engine import Task
from fedsieve.engine.federation import described, first_examples, resolve_model
from fedsieve.engine.setup import read_dataset
from fedsieve.recipes import load_recipe
from fedsieve.runs.export import sparse_file
from fedsieve.runs.export.metadata import ModelMetadata, parse_metadata
from fedsieve.runs.record import INPUTS, MANIFEST, require_manifest
from fedsieve.sparse.masks import weight_density
from fedsieve.types import Data, InputError, Params, Sparse, normalize_inputs


@dataclass(frozen=True)
class TrainedModel:
    """A plain network in eval mode, with its weights, and what is known of it."""

    network: nn.Module
    metadata: ModelMetadata

    def normalize(self, x: Tensor) -> Tensor:
        """Return what the network takes, float32, for raw examples [n, *shape]: uint8 stands for x / 255."""
        return normalize_inputs(x, self.metadata.mean, self.metadata.std)

    def weights(self) -> Params:
        """Return every tensor of the model by its name."""
        return {name: value.detach() for name, value in self.network.state_dict().items()}

    def density(self) -> float:
        """Return the share of non-zeros among the weights."""
        return weight_density(self.weights())

    def dense_bytes(self) -> int:
        """Return what all tensors take as they lie in memory."""
        return sum(value.numel() * value.element_size() for value in self.weights().values())


def open_model(path: Path, recipe: str = "") -> TrainedModel:
    """Return the model that a run directory ships, or that a .fsv file holds.

    ``recipe`` (``file.py:function``) is needed where the network is the user's own. Raises InputError.
    """
    weights: Mapping[str, Tensor | Sparse]
    if path.is_dir():
        metadata, weights = _metadata_of_run(path), _weights_of_run(path)
    else:
        metadata, weights = sparse_file.read_model(path)
    network = _empty_network(metadata, recipe)
    wanted = {name: (tuple(v.shape), v.dtype) for name, v in network.state_dict().items()}
    found = {name: (tuple(v.shape), (v.values if isinstance(v, Sparse) else v).dtype) for name, v in weights.items()}
    if wrong := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        raise InputError(
            f"{path}: the weights do not fit {metadata.network} at {', '.join(wrong[:3])}: restore the files"
        )
    dense = {name: v.dense() if isinstance(v, Sparse) else v for name, v in weights.items()}
    network.load_state_dict(dense, assign=True)
    return TrainedModel(network.requires_grad_(False).eval(), metadata)


def load_test_set(metadata: ModelMetadata, recipe: str = "", data: str | None = None) -> Data:
    """Return the test examples of the run that made a model. Raises InputError."""
    dataset = _dataset(metadata.run["task"], metadata.recipe, recipe, data)
    if (tuple(dataset.test.x.shape[1:]), tuple(dataset.classes)) != (metadata.shape, metadata.classes):
        raise InputError(f"{dataset.name} is not the data that the model was trained on: name the run's own --data")
    return first_examples(dataset.test, metadata.test_limit)


def _metadata_of_run(folder: Path) -> ModelMetadata:
    manifest = require_manifest(folder)
    return parse_metadata(manifest | (read_json(folder / INPUTS) or {}), f"{folder} ({MANIFEST}, {INPUTS})")


def _weights_of_run(folder: Path) -> Params:
    path = folder / "model.safetensors"
    if not path.is_file():
        raise InputError(f"{folder} has no model.safetensors: finish the run first (fedsieve run ... --resume)")
    try:
        return load_file(regular(path))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}): go on with the run (--resume), which writes it anew") from None


def _empty_network(metadata: ModelMetadata, recipe: str) -> nn.Module:
    """Return the network, its weights still to be filled in."""
    if metadata.network in MODELS:
        with torch.device("meta"):
            return MODELS[metadata.network](metadata.shape[0], len(metadata.classes))
    network = _own_task(metadata.run["task"], "model", metadata.recipe, recipe).model
    assert not isinstance(network, str)
    return resolve_model(network)


def _dataset(task: dict[str, Any], trained_by: str, recipe: str, data: str | None) -> Dataset:
    name = task.get("dataset")
    if isinstance(name, str) and name in NAMES:
        return load_dataset(name, root_from(data))
    return read_dataset(_own_task(task, "dataset", trained_by, recipe), data)


def _own_task(settings: dict[str, Any], field: str, trained_by: str, recipe: str) -> Task:
    """Return the task of the recipe that the user names, whose ``field`` is the function in the run's ``settings``."""
    wanted = settings.get(field)
    if not recipe:
        name = trained_by if ".py:" in trained_by else "FILE.py:FUNCTION"
        raise InputError(f"the {field} {wanted} is code of your own: name the recipe that trained it, --recipe {name}")
    task = load_recipe(recipe).task
    found = described(getattr(task, field))
    if isinstance(task.model, nn.Module) and field == "model":  # whose weights are those that training began with
        wanted, found = str(wanted).split(" ")[0], found.split(" ")[0]
    if found != wanted:
        raise InputError(f"--recipe {recipe} has another {field} than {wanted}: name the recipe that trained the model")
    return task
