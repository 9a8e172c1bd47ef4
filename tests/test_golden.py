"""Golden runs: three rounds of each digits recipe, exactly as they were when they were last looked at.

A change that is meant to change nothing must leave this file's numbers alone. After a change that is meant to, look at
the difference and run ``python tests/test_golden.py``. Losses differ in their last digits between processors.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedsieve import local, rounds
from fedsieve.recipes import load_recipe

GOLDEN = Path(__file__).with_name("golden.json")
RECIPES = [
    f"{method}.digits"
    for method in ("fedavg", "fedadam", "swat", "zerofl", "topk", "sparsefedpp", "nst", "pdst", "flash", "hetero_flash")
]


def measured(recipe: str) -> list[dict[str, float]]:
    short = replace(load_recipe(recipe), rounds=3, epochs=1, evaluate_every=3)
    stream = rounds(short, local(kernels="dense"))
    return [{"loss": r.metrics["loss"], "up": r.bytes_up, "down": r.bytes_down, "density": r.density} for r in stream]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_is_what_it_was(recipe: str) -> None:
    for now, then in zip(measured(recipe), json.loads(GOLDEN.read_text())[recipe], strict=True):
        assert now["loss"] == pytest.approx(then["loss"], rel=1e-4)
        assert now["density"] == pytest.approx(then["density"], rel=1e-3)
        assert (now["up"], now["down"]) == pytest.approx((then["up"], then["down"]), rel=1e-3)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({recipe: measured(recipe) for recipe in RECIPES}, indent=1) + "\n")
