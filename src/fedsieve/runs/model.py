"""A trained model, opened: from a run directory, a hub folder, or a .fsv file that ``fedsieve export`` wrote.

A network or a dataset of the user's own is code, which neither holds: it comes from the recipe that the user names.
Nothing that a file says is ever imported. A .fsv file leaves the zeros of the weights out; all else is kept to the bit:

    file = message of ``fedsieve.wire``, then its sha256 (32 bytes)
    tree = "metadata"    uint8: ``ModelMetadata.json`` in UTF-8
           "weights" every tensor by its name

A weight (two or more dimensions) goes as positions and values of its non-zeros where that is smaller, with few zeros
among them where output channels then share positions. Its zeros come back as +0.0, whichever sign they had: pruning
leaves both, and no sum of products tells them apart.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedsieve.client.lora import A as LORA_A
from fedsieve.client.lora import LoRA, merge_adapters_
from fedsieve.client.models import MODELS
from fedsieve.client.vector_models import VECTOR_MODELS
from fedsieve.data import NAMES, load_dataset, root_from
from fedsieve.data.storage import read_json, regular
from fedsieve.engine import Task
from fedsieve.engine.federation import described, first_examples
from fedsieve.engine.initial import no_model, read_fsv
from fedsieve.engine.models import resolve_model
from fedsieve.engine.setup import read_dataset
from fedsieve.recipes import load_model, load_recipe
from fedsieve.runs.record import INPUTS, MANIFEST, require_manifest
from fedsieve.sparse.masks import weight_density
from fedsieve.sparse.policy import floats_of
from fedsieve.types import Data, InputError, Params, Sparse, Tree, normalize_inputs, true_positions
from fedsieve.wire import WireError, encode, find_sharing

CONFIG = "config.json"
"""What a folder for a hub says of its model."""


@dataclass(frozen=True)
class ModelMetadata:
    """Where a model comes from, and what it takes and gives.

    One example is a tensor of ``shape`` in its dataset's own units; the model sees ``(x - mean) / std``.
    """

    recipe: str
    version: str
    """FedSieve's, when the model was trained."""
    run: dict[str, Any]
    """Every setting, as in ``run.json``."""
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def network(self) -> str:
        """The model's name, or ``module:function`` for one of the user's own."""
        return _name_of(self.run["task"]["model"])

    @property
    def dataset(self) -> str:
        """The dataset's name, or ``module:function`` for one of the user's own."""
        return _name_of(self.run["task"].get("dataset", ""))

    @property
    def adapters(self) -> LoRA | None:
        """The adapters that were trained, None if the model itself was; open models have them merged."""
        fields = self.run["task"].get("adapters")
        return LoRA(**{name: v for name, v in fields.items() if name != "kind"}) if fields else None

    @property
    def next_token(self) -> bool:
        """Whether it tells the next token of a text."""
        loss = self.run.get("task", {}).get("loss")
        return isinstance(loss, dict) and loss.get("kind") == "NextToken"

    @property
    def dtype(self) -> torch.dtype:
        """What the network takes."""
        return torch.int64 if self.next_token else torch.float32

    @property
    def test_limit(self) -> int:
        """How many test examples the run used; 0: all."""
        return int(self.run["task"].get("test_limit", 0))

    def json(self) -> str:
        """Return the metadata as text, for ``parse_metadata``."""
        return json.dumps(asdict(self), sort_keys=True)


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
        """Return the share of non-zeros among the weights, a shared one once."""
        return weight_density(floats_of(self.network))

    def dense_bytes(self) -> int:
        """Return what all tensors take as they lie in memory."""
        return sum(value.numel() * value.element_size() for value in self.weights().values())


def open_model(path: Path, recipe: str = "") -> TrainedModel:
    """Return the model that a run directory ships, or that a folder for a hub or a .fsv file holds.

    ``recipe`` (``file.py:function``) is needed where the network is the user's own. Raises InputError.
    """
    weights: Mapping[str, Tensor | Sparse]
    config = read_json(path / CONFIG) if path.is_dir() and not (path / MANIFEST).exists() else None
    if config is not None:
        metadata, weights = parse_metadata(config, str(path / CONFIG)), _weights_of_run(path)
    elif path.is_dir():
        about = require_manifest(path) | (read_json(path / INPUTS) or {})
        metadata, weights = parse_metadata(about, f"{path} ({MANIFEST}, {INPUTS})"), _weights_of_run(path)
    else:
        metadata, weights = read_model(path)
    network = _empty_network(metadata, recipe)
    if any(name.endswith(LORA_A) for name in weights) and (adapters := metadata.adapters):
        network = adapters.attach_(network)
    ours = {name: (tuple(v.shape), v.dtype) for name, v in network.state_dict().items()}
    theirs = {name: (tuple(v.shape), (v.values if isinstance(v, Sparse) else v).dtype) for name, v in weights.items()}
    if wrong := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        raise InputError(
            f"{path}: the weights do not fit {metadata.network} at {', '.join(wrong[:3])}: restore the files"
        )
    dense = {name: v.dense() if isinstance(v, Sparse) else v for name, v in weights.items()}
    _assign_(network, dense)
    network = merge_adapters_(network)
    return TrainedModel(network.requires_grad_(False).eval(), metadata)


def _assign_(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a network these tensors themselves; what it shares between places it shares afterwards."""
    first = {id(w): name for name, w in network.named_parameters()}
    shared = [(name, first[id(w)]) for name, w in network.named_parameters(remove_duplicate=False)]
    network.load_state_dict(weights, assign=True)
    for name, other in shared:
        if name != other:
            path, _, key = name.rpartition(".")
            setattr(network.get_submodule(path), key, network.get_parameter(other))


def load_test_set(metadata: ModelMetadata, recipe: str = "", data: str | None = None) -> Data:
    """Return the test examples of the run that made a model. Raises InputError."""
    task = metadata.run["task"]
    name = task.get("dataset")
    dataset = (
        load_dataset(name, root_from(data))
        if isinstance(name, str) and name in NAMES
        else read_dataset(_own_task(task, "dataset", metadata.recipe, recipe), data)
    )
    dataset = dataset.part(str(task.get("part", "")))
    if (dataset.test.shape, tuple(dataset.classes)) != (metadata.shape, metadata.classes):
        raise InputError(f"{dataset.name} is not the data that the model was trained on: name the run's own --data")
    return first_examples(dataset.test, metadata.test_limit)


def parse_metadata(values: Any, where: str) -> ModelMetadata:
    """Return the metadata that ``values``, an object of JSON, describes; InputError names ``where`` it stood."""
    with suppress(KeyError, TypeError, ValueError, OverflowError, IndexError, AttributeError):
        metadata = ModelMetadata(
            recipe=str(values["recipe"]),
            version=str(values["version"]),
            run=dict(values["run"]),
            classes=tuple(map(str, values["classes"])),
            shape=tuple(map(int, values["shape"])),
            mean=tuple(map(float, values["mean"])),
            std=tuple(map(float, values["std"])),
        )
        scales = [*metadata.mean, *metadata.std]
        fits = {len(metadata.mean), len(metadata.std)} <= {1, *metadata.shape[:1]} and all(map(math.isfinite, scales))
        if (
            fits
            and all(metadata.std)
            and min(metadata.shape, default=1) > 0
            and ((metadata.shape and metadata.classes) or metadata.network not in MODELS)
            and metadata.network
            and metadata.test_limit >= 0
        ):
            return metadata
    raise InputError(f"{where} does not say what the model is and takes: restore the file, or make it anew")


def encode_model(metadata: ModelMetadata, weights: Params) -> bytes:
    """Return the file of a model. Raises InputError for a tensor of a type that has no place in it."""
    text = torch.frombuffer(bytearray(metadata.json().encode()), dtype=torch.uint8)
    tree: Tree = {"metadata": text, "weights": {name: _smaller(v) for name, v in weights.items()}}
    try:
        message = encode(tree)
    except WireError as error:
        raise InputError(f"the model does not fit into a .fsv ({error}): export it as .safetensors") from None
    return message + hashlib.sha256(message).digest()


def read_model(path: Path) -> tuple[ModelMetadata, dict[str, Tensor | Sparse]]:
    """Return what ``encode_model`` was given, sparse weights as they are stored. Raises InputError."""
    text, weights = read_fsv(path)
    try:
        return parse_metadata(json.loads(text), str(path)), weights
    except (ValueError, RecursionError):
        raise no_model(path) from None


def _smaller(value: Tensor) -> Tensor | Sparse:
    """Return a weight as its non-zeros if they and a bit for each position take less than all of its numbers.

    Where output channels share their pattern but for few zeros, these are among them: positions then take fewer bits.
    """
    index = true_positions(value != 0)
    zeros = value.numel() - len(index)
    if value.dim() < 2 or zeros * value.element_size() * 8 <= value.numel():
        return value
    shape = tuple(value.shape)
    index = torch.from_numpy(find_sharing(index.numpy(), shape, fill=True)[2])
    return Sparse(value.reshape(-1)[index], index, shape)


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
    built_in = (MODELS | VECTOR_MODELS).get(metadata.network)
    if built_in and metadata.shape:
        with torch.device("meta"):
            return built_in(metadata.shape[0], max(1, len(metadata.classes)))
    if "kind" not in metadata.run["task"] and metadata.recipe == "compress":
        return _compressed_network(metadata, recipe)
    network = _own_task(metadata.run["task"], "model", metadata.recipe, recipe).model
    assert not isinstance(network, str)
    return resolve_model(network)


def module_name(model: nn.Module) -> str:
    """Return the class of a module as metadata name it."""
    return f"{type(model).__module__}:{type(model).__qualname__}"


def _compressed_network(metadata: ModelMetadata, function: str) -> nn.Module:
    """Return the network of a module that was compressed, from the user's function that makes one."""
    if not function:
        what = f"the model {metadata.network} is code of your own"
        raise InputError(f"{what}: name the function that makes it, --recipe FILE.py:FUNCTION")
    network = resolve_model(load_model(function))
    if module_name(network) != metadata.network:
        raise InputError(f"--recipe {function} gives {module_name(network)}, not {metadata.network}: name its own")
    return network


def _own_task(settings: dict[str, Any], field: str, trained_by: str, recipe: str) -> Task:
    """Return the task of the recipe that the user names, whose ``field`` is the function in the run's ``settings``."""
    theirs = settings.get(field)
    if not recipe:
        name = trained_by if ".py:" in trained_by else "FILE.py:FUNCTION"
        raise InputError(f"the {field} {theirs} is code of your own: name the recipe that trained it, --recipe {name}")
    task = load_recipe(recipe).task
    ours = described(getattr(task, field))
    if isinstance(task.model, nn.Module) and field == "model":  # whose weights are those that training began with
        theirs, ours = str(theirs).split(" ")[0], ours.split(" ")[0]
    if ours != theirs:
        raise InputError(f"--recipe {recipe} has another {field} than {theirs}: name the recipe that trained the model")
    return task


def _name_of(thing: Any) -> str:
    return thing if isinstance(thing, str) else json.dumps(thing)
