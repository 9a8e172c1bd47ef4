"""What the default bound refuses: no honest client, and one of four that lies about one weight.

Claim: of every digits recipe of more than one client (3 seeds, LDA 1.0 and 0.1) and every MNIST recipe (30 rounds, one
seed, LDA 1.0) no honest update is refused; and where one of four clients puts 1e3 into a weight once, or 1e3, 1e6, 1e18
and 1e30 in turn in every round, a digits run ends within a point of the run without that client's answers.
n: 80 rounds of the digits; a private round has 50 clients, of which one lies.

    python benchmarks/loose_bound.py [digits|mnist]   adds what results/loose_bound.json lacks (an hour; both side by
                                                      side are fine); then python benchmarks/readme.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rows import read_results, write_results

from fedsieve import Run, local, rounds
from fedsieve.cli.bench.measurement import machine
from fedsieve.data import root_from
from fedsieve.engine.setup import open_run
from fedsieve.methods import Private
from fedsieve.recipes import load_recipe, recipes
from fedsieve.server.robust import FEW, Loose
from fedsieve.types import Tree, rng
from fedsieve.types.contract import norms_of

ROOT = Path(__file__).parent
sys.path.append(str(ROOT.parent / "tests"))
from oracles.lies import Act, Reply, changed, largest, values_of  # noqa: E402

RESULTS = ROOT / "results" / "loose_bound.json"
NUMBERS = (1e3, 1e6, 1e18, 1e30)
ONCE = 5
SEEDS, MIXES, MNIST = (0, 1, 2), ("lda:1.0", "lda:0.1"), 30


def honest(run_: Run, last: int = 0) -> tuple[int, float]:
    """How many updates a run refuses, and the largest share of its bound that one comes to."""
    bound, refused, share = run_.bound, 0, 0.0
    assert isinstance(bound, Loose)
    federation = open_run(replace(run_, evaluate_every=run_.rounds), root_from(None))
    state, known = run_.method.init(federation.model(), rng(run_.seed, "init")), ()
    for one in rounds(federation, local(), last=last):
        refused += len(one.refused)
        new_norms = one.norms[max(0, len(one.norms) - len(one.clients) + len(one.refused)) :]
        limits = bound.limits([*known, *(new_norms[:FEW] if len(known) < FEW else ())], norms_of(state.params.items()))
        limits = bound.widened(limits, new_norms)
        share = max([share, *(n / limit for norms in new_norms for n, limit in zip(norms, limits, strict=True))])
        state, known = one.state, one.norms
    return refused, share


def four(name: str) -> Run:
    """Return a digits recipe of four clients a round, a private one of 50."""
    run_ = load_recipe(name)
    if isinstance(run_.method, Private):
        return replace(run_, method=replace(run_.method, cohort=run_.per_round - 1), evaluate_every=run_.rounds)
    return replace(run_, per_round=4, evaluate_every=run_.rounds)


def lying(run_: Run, number: Callable[[int], float | None], silent: bool = False) -> Act:
    """One of a round's clients puts a number into a weight, or says nothing, where ``number`` of the round is one."""

    def act(t: int, client: int, down: Tree, reply: Reply) -> Iterable[tuple[int, Tree]]:
        clients, value = run_.sample(t), number(t)
        if client == clients[t % len(clients)] and value is not None:
            if silent:
                return
            values_of(reply["tree"][largest(reply["tree"])])[0] = value
        yield client, reply

    return act


def once(t: int) -> float | None:
    return NUMBERS[0] if t == ONCE else None


def every(t: int) -> float:
    return NUMBERS[t % len(NUMBERS)]


def reached(run_: Run, act: Act) -> float:
    *_, final = rounds(run_, changed(act))
    assert final.accuracy is not None
    return round(100 * final.accuracy, 1)


def liar(name: str) -> dict[str, list[float]]:
    """The accuracies in percent without the liar's answers, and with them."""
    run_ = four(name)
    return {
        what: [reached(run_, lying(run_, number, silent)) for silent in (True, False)]
        for what, number in (("once", once), ("every", every))
    }


def mixed(name: str, seed: int, mix: str) -> Run:
    run_ = replace(load_recipe(name), seed=seed)
    return replace(run_, task=replace(run_.task, partition=mix))


def measured(known: dict[str, Any], dataset: str) -> Iterable[tuple[str, str, Any]]:
    """Yield what is not known yet of a dataset's recipes: the part, the recipe's name, and what was found."""
    names = [name for name in recipes() if name.endswith(f".{dataset}") and load_recipe(name).task.clients > 1]
    for name in names:
        if dataset == "digits" and name not in known["liar"]:
            yield "liar", name, liar(name)
        if name in known["honest"]:
            continue
        if dataset == "mnist":
            outcomes = [honest(load_recipe(name), MNIST)]
        else:
            outcomes = [honest(mixed(name, seed, mix)) for seed in SEEDS for mix in MIXES]
        yield "honest", name, [len(outcomes), sum(one for one, _ in outcomes), max(share for _, share in outcomes)]


def results() -> dict[str, Any]:
    """Return what is committed, or nothing yet."""
    return read_results(RESULTS) or {"machine": machine(), "honest": {}, "liar": {}}


def table() -> str:
    """Return the committed results as a table."""
    committed = results()
    lines = ["| recipe | honest runs | refused | closest to the bound | a lie once | a lie in every round |"]
    lines.append("|---|---|---|---|---|---|")
    for name, (runs, refused, share) in committed["honest"].items():
        both = committed["liar"].get(name)
        ends = [f"{b:.1f} (without {a:.1f})" for a, b in both.values()] if both else ["", ""]
        near = f"{100 * share:.1f} %" if share else ""  # a private method has a bound of its own
        lines.append(f"| `{name}` | {runs} | {refused} | {near} | {ends[0]} | {ends[1]} |")
    return "\n".join(lines)


def main(datasets: list[str]) -> None:
    for dataset in datasets or ["digits", "mnist"]:
        for part, name, values in measured(results(), dataset):
            committed = results()
            committed[part][name] = values
            write_results(RESULTS, committed)
            print(part, name, values, flush=True)
    print(table())


if __name__ == "__main__":
    main(sys.argv[1:])
