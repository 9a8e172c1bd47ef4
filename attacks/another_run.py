"""Messages of another run with the same key: other settings or the same again; down to clients, and up."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from common import KEY, Outcome, report, tried

from fedsieve.engine import Federation, Run, open_run
from fedsieve.engine.messages import Messages
from fedsieve.recipes import load_recipe
from fedsieve.types import RoundContext, rng


def opened(run: Run) -> Federation:
    """Return a run that seals with the key that all of them share."""
    return replace(open_run(run), key=KEY)


def attack() -> list[Outcome]:
    """Try it."""
    run = load_recipe("fedavg.digits")
    ours = opened(run)
    others = {
        "the same run again": run,
        "another lr": replace(run, lr=run.lr / 2),
        "another batch": replace(run, batch=run.batch + 1),
        "another number of rounds": replace(run, rounds=run.rounds + 1),
        "another partition": replace(run, task=replace(run.task, partition="lda:0.5")),
    }
    found = []
    for what, other in others.items():
        server, mine = Messages(opened(other)), Messages(ours)
        tree = run.method.broadcast(run.method.init(ours.model(), rng(run.seed, "init")), RoundContext())
        down = server.broadcast(1, {0: 0}, {0: tree})
        up = mine.encode_reply(1, 0, {"n": 1.0}, mine.known(tree))
        found.append(tried(f"{what}: its broadcast, to our client", partial(mine.unseal_broadcast, 1, 0, down[0])))
        found.append(tried(f"{what}: our client's answer, to its server", partial(down.decode_reply, 0, up)))
    return found


if __name__ == "__main__":
    report(attack())
