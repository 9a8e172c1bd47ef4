"""The papers' runs compute what they did when the committed results of them were made.

Each recipe of a table or figure is run for two rounds, at a low learning rate, on a few random examples. A change that
is meant to alter nothing must leave ``arithmetic.json`` alone. After one that is meant to, run
``python tests/recipes/test_arithmetic.py``: it raises the number of every recipe whose probe differs, so that the
committed results of it are shown as stale.
"""

import json
from dataclasses import replace

import pytest
import torch

from fedsieve import Data, Dataset, Run, local, rounds
from fedsieve.recipes import load_recipe
from fedsieve.recipes.papers.arithmetic import FILE, arithmetic, without_split
from fedsieve.recipes.papers.parts import paper_parts

SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 8, 8), "femnist": (1, 28, 28), "speech_commands": (1, 8, 8)}
"""ResNet-18 is given smaller images than the papers'."""
CLASSES = {"mnist": 10, "cifar10": 10, "femnist": 62, "speech_commands": 12}
RECIPES = {without_split(row.recipe): row.recipe for part in paper_parts() for row in part.runs}


def probe_run(recipe: str) -> Run:
    """Return a recipe on ten random examples for each of a few clients, two rounds, a step each."""
    whole = load_recipe(recipe)
    name, task, method = str(whole.task.dataset), whole.task, whole.method
    initialisation = task.initialisation if without_split(recipe) == "sparsefedpp.cifar10" else "model"
    clients = 1 if task.clients == 1 else 4 if len(task.tiers) > 1 else 2
    draw = torch.Generator().manual_seed(1)
    many, classes = 10 * clients, CLASSES[name]
    x, y = torch.randn(many, *SHAPES[name], generator=draw), torch.arange(many) % classes
    data = Data(x, y)
    groups = {"group": torch.arange(many) % clients} if task.partition == "group" else {}
    dataset = Dataset(name, data, data, tuple(map(str, range(classes))), **groups)
    warm_up = {"c_d": 1, "E_d": 2}
    method = replace(method, **{name: n for name, n in warm_up.items() if hasattr(method, name)})  # type: ignore[arg-type]
    task = replace(task, dataset=dataset, clients=clients, initialisation=initialisation)  # which takes its time
    lr, end = 0.02, 0.02 * whole.lr_end / whole.lr  # so few examples diverge at the papers' rates
    short = replace(whole, task=task, method=method, rounds=2, per_round=clients, lr=lr, lr_end=end)
    return replace(short, batch=10, evaluate_every=2)


def probe(recipe: str) -> dict[str, list[float]]:
    """Return the losses of both rounds, and the density and the sum of all magnitudes of both models."""
    seen = [r for r in rounds(probe_run(recipe), local(kernels="dense")) if r.t > 0]
    sums = [sum(float(w.abs().sum()) for w in r.model.values() if w.is_floating_point()) for r in seen]
    losses = [r.metrics["loss"] for r in seen]
    return {"loss": losses, "density": [r.density for r in seen], "magnitude": sums}


@pytest.mark.filterwarnings("ignore::fedsieve.sparse.masks.EmptyLayer")
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_papers_run_computes_what_it_did(recipe: str) -> None:
    expected = arithmetic()[recipe]["probe"]
    for name, values in probe(RECIPES[recipe]).items():
        assert values == pytest.approx(expected[name], rel=2e-3), name


def test_every_recipe_of_the_papers_has_a_version_and_no_other() -> None:
    assert arithmetic().keys() == RECIPES.keys()
    assert all(type(one["version"]) is int for one in arithmetic().values())


def raised(recipe: str) -> dict[str, object]:
    """Return a recipe's probe with its number, one higher where the probe differs."""
    before, now = arithmetic().get(recipe), probe(RECIPES[recipe])
    if before is None:
        return {"version": 1, "probe": now}
    same = all(now[name] == pytest.approx(before["probe"][name], rel=2e-3) for name in now)
    return before if same else {"version": before["version"] + 1, "probe": now}


if __name__ == "__main__":
    FILE.write_text(json.dumps({recipe: raised(recipe) for recipe in sorted(RECIPES)}, indent=1) + "\n")
