"""Which arithmetic the papers' runs have: a number for each recipe, raised when a change gives its runs other numbers.

``arithmetic.json`` beside this file holds the numbers, and what a probe of each recipe gave when they were last raised
(``tests/recipes/test_arithmetic.py`` runs the probes). A result that was kept under another number is stale.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("arithmetic.json")


def arithmetic_version(recipe: str) -> int:
    """Return the number of a recipe's arithmetic; 1 where it has never changed."""
    return int(arithmetic().get(without_split(recipe), {}).get("version", 1))


def without_split(recipe: str) -> str:
    """Return a recipe's name without its partition: ``zerofl.cifar10`` of ``zerofl.cifar10_niid``."""
    return recipe.removesuffix("_iid").removesuffix("_niid")


@cache
def arithmetic() -> dict[str, Any]:
    """Return version and probe of every recipe that a table or figure runs."""
    content: dict[str, Any] = json.loads(FILE.read_text())
    return content
