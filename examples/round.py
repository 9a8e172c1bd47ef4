"""Rounds of FedAvg, then of ZeroFL, by the functions that every engine calls (python examples/round.py)."""

from dataclasses import replace
from typing import Any

from fedsieve import Method, Update, open_run
from fedsieve.client.evaluation import accuracy
from fedsieve.client.process import num_threads
from fedsieve.client.training import load_
from fedsieve.methods import FedAvg, ZeroFL
from fedsieve.recipes.catalogue import PRESETS
from fedsieve.types import Params, rng
from fedsieve.wire import decode, encode


def train(method: Method[Any], rounds: int) -> Params:
    """Train 20 clients' digits, 5 clients a round, and return the deployed model."""
    run = replace(PRESETS["digits"].run(method), rounds=rounds)
    federation = open_run(run)  # the data, dealt out to the clients
    resident = method.prepare(federation.model())  # the module that clients train: SWAT layers, if it is ZeroFL
    state = method.init(federation.model(), rng(run.seed, "init"))

    for t in range(1, rounds + 1):
        context, updates, bytes_up = run.context(t), list[Update](), 0
        down = encode(method.broadcast(state, context))  # from here on these are bytes

        for client in run.sample(t):
            device = federation.device(t, client, resident, "cpu", memory={})  # its examples, epochs, learning rate
            update = method.client(decode(down), device)
            up = encode(update.tree)  # of ZeroFL: the top weights' values and positions
            updates.append(Update(decode(up), update.n))
            bytes_up += len(up)

        state = method.aggregate(state, updates, context)  # the mean, weighted by the numbers of examples
        model = method.deploy(state)
        tested = accuracy(load_(federation.model(), model), federation.test())
        print(f"{method.name} round {t}: {tested:.1%}, {bytes_up:,} bytes up")
    return model


if __name__ == "__main__":
    with num_threads(1):  # a client's sums do not depend on the machine's cores
        train(FedAvg(), rounds=20)
        train(ZeroFL(sparsity=0.9, r_mask=0.1), rounds=20)
