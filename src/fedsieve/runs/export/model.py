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
from fedsieve.engine.experiment import first_examples
from fedsieve.engine.fingerprint import described
from fedsieve.engine.setup import read_dataset
from fedsieve.engine.user_inputs import resolve_model
from fedsieve.recipes import load_recipe
from fedsieve.runs.export import sparse_file
from fedsieve.runs.export.metadata import Card, card_of
from fedsieve.runs.schema import inputs_of
from fedsieve.sparse.topk import weight_density
from fedsieve.types import Data, InputError, Params, Sparse, normalize_inputs


@dataclass(frozen=True)
class Deployed:
    """A plain network in eval mode, with its weights, and what is known of it."""

    model: nn.Module
    card: Card

    def normalised(self, x: Tensor) -> Tensor:
        """Return what the network takes, float32, for raw examples [n, *shape]: uint8 stands for x / 255."""
        return normalize_inputs(x, self.card.mean, self.card.std)

    def weights(self) -> Params:
        """Return every tensor of the model by its name."""
        return {name: value.detach() for name, value in self.model.state_dict().items()}

    def density(self) -> float:
        """Return the share of non-zeros among the weights."""
        return weight_density(self.weights())

    def dense_bytes(self) -> int:
        """Return what all tensors take as they lie in memory."""
        return sum(value.numel() * value.element_size() for value in self.weights().values())


def open_deployed(path: Path, recipe: str = "", data: str | None = None) -> Deployed:
    """Return the model that a run directory ships, or that a .fsv file holds.

    ``recipe`` (``file.py:function``) is needed where the network is the user's own; ``data`` names the folder of the
    datasets, which only runs that have no ``inputs.json`` need. Raises InputError.
    """
    weights: Mapping[str, Tensor | Sparse]
    if path.is_dir():
        card, weights = _card_of_run(path, recipe, data), _weights_of_run(path)
    else:
        card, weights = sparse_file.read(path)
    model = _network(card, recipe)
    wanted = {name: (tuple(v.shape), v.dtype) for name, v in model.state_dict().items()}
    found = {name: (tuple(v.shape), (v.values if isinstance(v, Sparse) else v).dtype) for name, v in weights.items()}
    if wrong := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        raise InputError(f"{path}: the weights do not fit {card.network} at {', '.join(wrong[:3])}: restore the files")
    dense = {name: v.dense() if isinstance(v, Sparse) else v for name, v in weights.items()}
    model.load_state_dict(dense, assign=True)
    return Deployed(model.requires_grad_(False).eval(), card)


def own_test_set(card: Card, recipe: str = "", data: str | None = None) -> Data:
    """Return the test examples of the run that made a model. Raises InputError."""
    dataset = _dataset(card.run["task"], card.recipe, recipe, data)
    if (tuple(dataset.test.x.shape[1:]), tuple(dataset.classes)) != (card.shape, card.classes):
        raise InputError(f"{dataset.name} is not the data that the model was trained on: name the run's own --data")
    return first_examples(dataset.test, card.test_limit)


def _card_of_run(folder: Path, recipe: str, data: str | None) -> Card:
    about = read_json(folder / "run.json")
    if about is None:
        raise InputError(f"{folder} is not a run directory (no run.json): name a folder that `fedsieve run` wrote")
    inputs = read_json(folder / "inputs.json")
    if inputs is None:  # a run from before it was written
        run = about.get("run")
        task = run.get("task") if isinstance(run, dict) else None
        inputs = inputs_of(_dataset(task, str(about.get("recipe")), recipe, data)) if isinstance(task, dict) else {}
    return card_of(about | inputs, f"{folder} (run.json, inputs.json)")


def _weights_of_run(folder: Path) -> Params:
    path = folder / "model.safetensors"
    if not path.is_file():
        raise InputError(f"{folder} has no model.safetensors: finish the run first (fedsieve run ... --resume)")
    try:
        return load_file(regular(path))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}): go on with the run (--resume), which writes it anew") from None


def _network(card: Card, recipe: str) -> nn.Module:
    """Return the network, its weights still to be filled in."""
    if card.network in MODELS:
        with torch.device("meta"):
            return MODELS[card.network](card.shape[0], len(card.classes))
    network = _own_task(card.run["task"], "model", card.recipe, recipe).model
    assert not isinstance(network, str)
    return resolve_model(network)


def _dataset(told: dict[str, Any], trained_by: str, recipe: str, data: str | None) -> Dataset:
    name = told.get("dataset")
    if isinstance(name, str) and name in NAMES:
        return load_dataset(name, root_from(data))
    return read_dataset(_own_task(told, "dataset", trained_by, recipe), data)


def _own_task(told: dict[str, Any], field: str, trained_by: str, recipe: str) -> Task:
    """Return the task of the recipe that the user names, whose ``field`` is the function that the run was told."""
    wanted = told.get(field)
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
