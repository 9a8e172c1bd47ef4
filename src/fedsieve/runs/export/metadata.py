"""What must be known of a model, beside its weights, to use it: plain JSON, and never code."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from fedsieve.types import InputError


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
        return _name_of(self.run["task"]["dataset"])

    @property
    def test_limit(self) -> int:
        """How many test examples the run used; 0: all."""
        return int(self.run["task"].get("test_limit", 0))

    def json(self) -> str:
        """Return the metadata as text, for ``parse_metadata``."""
        return json.dumps(asdict(self), sort_keys=True)


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
        fits = {len(metadata.mean), len(metadata.std)} <= {1, metadata.shape[0]} and all(map(math.isfinite, scales))
        if (
            fits
            and all(metadata.std)
            and metadata.classes
            and min(metadata.shape) > 0
            and metadata.network
            and metadata.test_limit >= 0
        ):
            return metadata
    raise InputError(f"{where} does not say what the model is and takes: restore the file, or make it anew")


def _name_of(thing: Any) -> str:
    return thing if isinstance(thing, str) else json.dumps(thing)
