"""The client's half of the app: the federation as one SuperNode sees it, with the recipe's examples or its own.

Its own are a .npz or .safetensors file with x and y, or a folder of pictures by class.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedsieve.data import Dataset
from fedsieve.data.storage import UNREADABLE, regular
from fedsieve.engine import Federation
from fedsieve.engine.worker import Worker
from fedsieve.flower.app.project import AppConfig, message_key, read_config
from fedsieve.flower.engine import NodeContext
from fedsieve.runs.prediction import IMAGES, load_image
from fedsieve.types import Data, InputError

FORMS = "a .npz or .safetensors file with arrays x and y, or a folder of pictures, a sub-folder for each class"
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_cached: tuple[Any, Worker] | None = None


@dataclass(frozen=True)
class InputSpec:
    """What the model takes and tells apart, as the server says it."""

    classes: tuple[str, ...]
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, inputs: dict[str, Any]) -> InputSpec:
        """Return the inputs that ``schema.inputs_of`` describes."""
        return cls(tuple(inputs["classes"]), tuple(inputs["shape"]), tuple(inputs["mean"]), tuple(inputs["std"]))


def worker_for(here: Path, place: NodeContext) -> Worker:
    """Return this process's worker: the last one, unless it is another's; in a simulation it serves all clients."""
    global _cached
    own = [] if place.key else sorted(place.node.items())
    mark = (here, place.key, sorted(place.config.items()), sorted(place.about.items()), own)
    if _cached is None or _cached[0] != mark:
        config = read_config(place.config)
        name = str(place.about.get("run", ""))
        federation = replace(_federation(config, here, place), key=message_key(place.key), name=name)
        _cached = mark, Worker(federation, "cpu", config.kernels)
    return _cached[1]


def _federation(config: AppConfig, here: Path, place: NodeContext) -> Federation:
    path, client = str(place.node.get("data", "")), place.node.get("partition-id")
    if place.key is not None:
        if config.own_data:
            raise InputError("own-data is for SuperNodes: a simulation has no data but the recipe's")
        return config.federation(here)
    if config.own_data != bool(path):
        raise InputError(
            "the run is on the SuperNodes' own data: start this one with --node-config 'data=\"/PATH\" partition-id=N'"
            if config.own_data
            else "this SuperNode has data of its own, which the run is not on: -c 'own-data=true' makes it so"
        )
    if not path:
        return config.federation(here)
    if not isinstance(client, int):
        raise InputError("a SuperNode with data= needs a partition-id= as well, its number among the run's clients")
    return _own(config, here, Path(path).expanduser(), client, InputSpec.of(json.loads(str(place.about["inputs"]))))


def _own(config: AppConfig, here: Path, path: Path, client: int, inputs: InputSpec) -> Federation:
    """Return the run with the examples at ``path``, all of them this client's."""
    run, data = config.run(here), load_local_data(path, inputs)
    nothing, all_ = torch.arange(0), torch.arange(len(data))
    dataset = Dataset(path.name, data, data.subset(nothing), inputs.classes)
    shards = tuple(all_ if i == client else nothing for i in range(run.task.clients))
    return Federation(run, dataset, shards, config.measures, own={client: len(data)})


def load_local_data(path: Path, inputs: InputSpec) -> Data:
    """Return the examples at ``path``, raw: uint8 for x / 255, or float32 in the dataset's units. Raises InputError."""
    if not path.exists():
        raise InputError(f"data={path}: there is nothing; name {FORMS}")
    x, y = _folder(path, inputs) if path.is_dir() else _file(path)
    shape, classes = [*inputs.shape], len(inputs.classes)
    if list(x.shape[1:]) != shape or x.dtype not in (torch.uint8, torch.float32):
        raise InputError(
            f"data={path}: x must be uint8 or float32 of shape {['n', *shape]}, it is {x.dtype} {[*x.shape]}"
        )
    if x.is_floating_point() and not x.isfinite().all():
        raise InputError(f"data={path}: x holds NaN or infinity: take those examples out")
    if y.shape != x.shape[:1] or not len(y):
        raise InputError(f"data={path}: y must hold a whole number for each of the {len(x)} examples, at least one")
    if y.dtype not in WHOLE:
        raise InputError(
            f"data={path}: y must hold whole numbers, as uint8, int8, int16, int32 or int64, not {y.dtype}"
        )
    if not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise InputError(f"data={path}: y must be from 0 to {classes - 1}, it is {int(y.min())} to {int(y.max())}")
    return Data(x, y.long(), inputs.mean, inputs.std)


def _file(path: Path) -> tuple[Tensor, Tensor]:
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(regular(path))
            return tensors["x"], tensors["y"]
        if path.suffix == ".npz":
            with np.load(regular(path), allow_pickle=False) as arrays:
                return torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    except (*UNREADABLE, SafetensorError, TypeError) as error:
        raise InputError(f"data={path} cannot be read ({error}): it must hold arrays x and y") from None
    raise InputError(f"data={path} is of no known form: name {FORMS}")


def _folder(path: Path, inputs: InputSpec) -> tuple[Tensor, Tensor]:
    """Return the pictures of all classes, sized as the model takes them, in the order of classes and names."""
    if len(inputs.shape) != 3 or inputs.shape[0] not in (1, 3):
        raise InputError(f"data={path}: the model takes {[*inputs.shape]}, which is no picture: use .npz")
    strange = sorted(p.name for p in path.iterdir() if p.is_dir() and p.name not in inputs.classes)
    if strange:
        raise InputError(f"data={path}: {strange[0]} is no class; the classes are {', '.join(inputs.classes)}")
    pictures = [
        (file, label)
        for label, name in enumerate(inputs.classes)
        for file in sorted((path / name).glob("*"))
        if file.suffix.lower() in IMAGES
    ]
    if not pictures:
        raise InputError(f"data={path} holds no picture ({', '.join(IMAGES)}) in a folder named after a class")
    x = torch.stack([load_image(file, inputs.shape) for file, _ in pictures])
    return x, torch.tensor([label for _, label in pictures])
