"""What must be known of a model, beside its weights, to use it: plain JSON, and never code."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from fedsieve.types import InputError


@dataclass(frozen=True)
class Card:
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
        return _named(self.run["task"]["model"])

    @property
    def dataset(self) -> str:
        """The dataset's name, or ``module:function`` for one of the user's own."""
        return _named(self.run["task"]["dataset"])

    @property
    def test_limit(self) -> int:
        """How many test examples the run used; 0: all."""
        return int(self.run["task"].get("test_limit", 0))

    def json(self) -> str:
        """Return the card as text, for ``card_of``."""
        return json.dumps(asdict(self), sort_keys=True)


def card_of(told: Any, where: str) -> Card:
    """Return the card that ``told``, an object of JSON, describes. Raises InputError, naming ``where`` it stood."""
    with suppress(KeyError, TypeError, ValueError, OverflowError, IndexError, AttributeError):
        card = Card(
            recipe=str(told["recipe"]),
            version=str(told["version"]),
            run=dict(told["run"]),
            classes=tuple(map(str, told["classes"])),
            shape=tuple(map(int, told["shape"])),
            mean=tuple(map(float, told["mean"])),
            std=tuple(map(float, told["std"])),
        )
        scales = [*card.mean, *card.std]
        fits = {len(card.mean), len(card.std)} <= {1, card.shape[0]} and all(map(math.isfinite, scales))
        if fits and all(card.std) and card.classes and min(card.shape) > 0 and card.network and card.test_limit >= 0:
            return card
    raise InputError(f"{where} does not say what the model is and takes: restore the file, or make it anew")


def _named(thing: Any) -> str:
    return thing if isinstance(thing, str) else json.dumps(thing)
