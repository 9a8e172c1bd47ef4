"""What clients keep of broadcasts: frozen weights and masks travel once, on every engine, and after every loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engines import ENGINES
from fedsieve import Data, Dataset, Run, Task, methods
from fedsieve.engine import local, rounds
from fedsieve.engine.cache import LACKS, LOST, CacheEntry, CacheMiss, flat, join, without
from fedsieve.engine.engines import Engine, Exchange
from fedsieve.engine.federation import Federation
from fedsieve.engine.messages import Messages
from fedsieve.engine.rollback import Memory
from fedsieve.engine.setup import open_run
from fedsieve.engine.worker import Worker, run_client
from fedsieve.flower.engine.client import ClientMemory
from fedsieve.runs.execution import Execution
from fedsieve.runs.record import read_rows
from fedsieve.runs.recorder import record_run
from fedsieve.types import Method, Sparse
from fedsieve.wire import TAG, Known, WireError, base_of, encode
from tiny import TIMES

CLIENTS = 4


def backbone() -> nn.Module:
    """A network of which 4,160 weights are frozen, and 452 trained."""
    layers = nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4), nn.Linear(4, 16), nn.Linear(16, 4), nn.Linear(4, 4)
    model = nn.Sequential(*layers)
    model[0].requires_grad_(False)
    return model


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def dataset() -> Dataset:
    torch.manual_seed(0)
    x, y = torch.randn(96, 64), torch.arange(96) % 4
    return Dataset("frozen", Data(x, y), Data(x[:16], y[:16]), tuple("abcd"))


def run_of(method: Method[Any], model: Callable[[], nn.Module] = backbone, **settings: Any) -> Run:
    task = Task(model=model, dataset=dataset, clients=CLIENTS, partition="iid")
    return Run(
        task=task, method=method, **{"rounds": 4, "per_round": 2, "epochs": 1, "batch": 8, "lr": 0.1, **settings}
    )


FROZEN = {
    "fedavg": methods.FedAvg(),
    "scaffold": methods.SCAFFOLD(),
    "topk": methods.TopK(0.5),
    "flash": methods.FLASH(density=0.5, c_d=2, E_d=2),
    "zerofl": methods.ZeroFL(0.5, 0.2, "top_diff"),
}


def rows_of(out: Path, run: Run, engine: Callable[[], Engine], *executions: Execution) -> list[dict[str, Any]]:
    for execution in executions or (Execution(),):
        [*record_run(out, open_run(run), engine(), "tests.cache", execution)]
    return [row | TIMES for row in read_rows(out)]


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_weights_travel_once_to_each_client(name: str, tmp_path: Path) -> None:
    run, copies = run_of(FROZEN[name], per_round=3), 1 + (name == "scaffold")
    results = [*rounds(run, local())]
    seen = set[int]()
    for result in results:
        new = [client for client in result.clients if client not in seen]
        seen |= {*result.clients}
        others = result.bytes_down - 4 * 4160 * len(new)
        assert -2200 * len(new) < others <= len(result.clients) * (4 * copies * 452 + 300), (result.t, new, others)
    frozen = results[0].model["0.weight"], results[-1].model["0.weight"]
    assert torch.equal(*frozen)


@pytest.mark.parametrize("name", ["fedavg", "flash"])
@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=[pytest.mark.system] if "pool" in name else []) for name in ENGINES]
)
def test_every_engine_counts_the_same_bytes_though_interrupted(name: str, engine: str, tmp_path: Path) -> None:
    run = run_of(FROZEN[name])
    wanted = rows_of(tmp_path / "local", run, local)
    parts = Execution(until=2), Execution(resume=True)
    assert rows_of(tmp_path / "other", run, ENGINES[engine], *parts) == wanted


def test_masks_that_depend_on_data_travel_once_until_they_move() -> None:
    method = methods.FedDST(density=0.5, interval=3, end=1.0)
    run = run_of(method, plain, per_round=CLIENTS, rounds=7)
    stream = list(rounds(run, local()))
    masks = [result.state.mask for result in stream]
    moved = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in pairwise(masks)]
    assert moved == [t in (2, 5) for t in range(2, 8)]
    positions = CLIENTS * 64 * 68 / 8  # what masks of density .5 take, by their entropy
    for before, after in pairwise(stream):
        tree = method.broadcast(before.state, run.context(after.t))
        whole = Messages(open_run(run)).broadcast(after.t, dict.fromkeys(range(CLIENTS), 0), {0: tree}).size
        less = 0.9 * positions * (after.t in (2, 4, 5, 7))
        assert less <= whole - after.bytes_down <= 1.3 * less


@pytest.mark.parametrize("lost", [LOST, LACKS])
def test_a_client_that_lost_them_is_served_again_in_the_round(lost: bytes) -> None:
    run = run_of(methods.FedAvg(), per_round=CLIENTS)
    wanted = [*rounds(run, local())]

    @contextmanager
    def forgetful(federation: Federation, memory: Memory) -> Iterator[Exchange]:
        worker, asked = Worker(federation), list[tuple[int, int]]()

        def exchange(t: int, messages: Mapping[int, bytes]) -> Iterable[tuple[int, bytes]]:
            for client, message in messages.items():
                asked.append((t, client))
                again = asked.count((t, client)) > 1
                assert bool(base_of(message[TAG:])) == (t > 1 and not again)
                if t == 3 and client < 2 and not again:
                    yield client, lost
                else:
                    yield client, run_client(worker, t, client, message)[0]

        yield exchange

    results = [*rounds(run, forgetful)]
    more = [b.bytes_down - a.bytes_down for a, b in zip(wanted, results, strict=True)]
    whole = wanted[0].bytes_down // CLIENTS
    assert more[0] == more[1] == more[3] == 0
    assert more[2] == 0 if lost == LACKS else abs(more[2] - 2 * whole) < 200
    assert [r.accuracy for r in results] == [r.accuracy for r in wanted]
    assert not any(r.refused for r in results)


def test_a_digest_that_does_not_match_is_refused() -> None:
    federation = open_run(run_of(methods.FedAvg()))
    server = Messages(federation)
    tree = federation.run.method.init(federation.model(), torch.Generator()).params
    first = server.broadcast(1, {0: 0}, {0: tree})
    client = Messages(replace(federation, cache=type(federation.cache)()))
    client.decode_broadcast(client.unseal_broadcast(1, 0, first[0]))
    message = server.broadcast(2, {0: 0}, {0: tree}, {0: first.digests(0)})[0]
    assert len(message) < len(first[0]) / 4
    opened = client.decode_broadcast(client.unseal_broadcast(2, 0, message))
    assert opened.keys() == tree.keys()
    assert all(torch.equal(opened[name], v) for name, v in tree.items())  # type: ignore[arg-type]
    at = TAG + 5 + 16  # the digest of the base, behind magic, flags and manifest
    forged = message[:at] + bytes(16) + message[at + 16 :]
    with pytest.raises(CacheMiss):
        client.unseal_broadcast(2, 0, forged)
    with pytest.raises(WireError, match="seal"):
        client.unseal_broadcast(2, 0, message[:-1] + bytes([message[-1] ^ 1]))
    other = tree | {"0.weight": tree["0.weight"] + 1}
    assert not base_of(server.broadcast(3, {0: 0}, {0: other}, {0: first.digests(0)})[0][TAG:])


def test_a_supernode_keeps_them_in_a_file(tmp_path: Path) -> None:
    federation = open_run(run_of(methods.FedAvg()))
    tree = federation.run.method.init(federation.model(), torch.Generator()).params
    tree = tree | {"2.weight": Sparse.of(tree["2.weight"], tree["2.weight"] > 0)}
    server = Messages(federation)
    first = server.broadcast(1, {0: 0}, {0: tree})
    memory = ClientMemory(tmp_path, "ab" * 8, 0)
    memory.keep_cache(federation.cache)
    (path,) = tmp_path.rglob("*.cache")
    before = path.stat().st_mtime_ns
    memory.keep_cache(federation.cache)
    assert path.stat().st_mtime_ns == before
    again = Messages(replace(federation, cache=type(federation.cache)()))
    memory.load_cache(again)
    message = server.broadcast(2, {0: 0}, {0: tree}, {0: first.digests(0)})[0]
    opened: Any = again.decode_broadcast(again.unseal_broadcast(2, 0, message))
    assert torch.equal(opened["2.weight"].dense(), tree["2.weight"].dense())
    assert torch.equal(opened["0.weight"], tree["0.weight"])
    path.write_bytes(b"damaged")
    broken = Messages(replace(federation, cache=type(federation.cache)()))
    memory.load_cache(broken)
    with pytest.raises(CacheMiss):
        broken.unseal_broadcast(2, 0, message)


def test_a_tree_loses_frozen_weights_where_they_stand_and_gets_them_back() -> None:
    a, b = torch.randn(3), torch.randn(3)
    tree = {"stage": 1.0, "params": {"a": a, "w": b}, "control": {"a": b, "w": a}, "a": a.double()}
    entry = CacheEntry.of(tree, {"a"}, Known(finite=False))
    assert {*flat(entry.weights)} == {"params/a", "control/a"}
    assert not {*flat(without(tree, entry.weights))} & {*flat(entry.weights)}
    rest = without(tree, entry.weights)
    assert {*flat(join(rest, entry.weights))} == {*flat(tree)}
    assert join(rest, entry.weights)["params"]["a"] is a
    other = CacheEntry.of({**tree, "control": {"a": a, "w": a}}, {"a"}, Known(finite=False))
    assert entry.digests[0] != other.digests[0]
    assert encode(rest) != encode(tree)


def test_tensors_alike_share_their_memory() -> None:
    federation = open_run(run_of(methods.FedAvg()))
    weights = {name: v.clone() for name, v in federation.model().state_dict().items()}
    entries = [
        federation.cache.put(CacheEntry.of({n: v.clone() for n, v in weights.items()}, {"0.weight"}, Known()))
        for _ in range(3)
    ]
    assert entries[0] is entries[1] is entries[2]
    moved: dict[str, Tensor | Sparse] = {**weights, "2.weight": Sparse.of(weights["2.weight"], weights["2.weight"] > 0)}
    with_mask = federation.cache.put(CacheEntry.of(moved, {"0.weight"}, Known()))
    assert with_mask.weights is entries[0].weights
    assert federation.cache.newest is with_mask
