"""Messages in a run: what is not sealed for this round, client and base is refused, and the round goes on."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from engines import pickled
from fedsieve import Dataset, local
from fedsieve.engine.engines import Engine, Exchange
from fedsieve.engine.federation import Federation
from fedsieve.engine.loop import rounds
from fedsieve.engine.messages import UNSENT, Messages
from fedsieve.engine.rollback import Checkpoint, Memory
from fedsieve.engine.setup import open_run
from fedsieve.engine.worker import Worker, run_client
from fedsieve.methods import FLASH, FedAvg, ZeroFL
from fedsieve.types import InputError, Params, RoundContext, flatten
from fedsieve.wire import TAG, WireError, decode
from tiny import tiny_run


@dataclass
class Meddler:
    """An engine that changes one client's answer from round 2 on."""

    act: str
    victim: int = -1
    before: dict[int, bytes] = field(default_factory=dict)

    def __call__(self, federation: Federation, memory: Memory) -> Any:
        inner: Engine = local(kernels="dense")

        @contextmanager
        def engine() -> Iterator[Exchange]:
            with inner(federation, memory) as exchange:

                def meddled(t: int, messages: Mapping[int, bytes]) -> Iterable[tuple[int, bytes]]:
                    replies = dict(exchange(t, messages))
                    first, second = list(replies)[:2]
                    self.victim = first
                    told = dict(replies)
                    if t > 1:
                        told[first] = self.changed(told[first], replies[second], messages[first])
                    self.before = replies
                    return list(told.items())

                yield meddled

        return engine()

    def changed(self, own: bytes, other: bytes, down: bytes) -> bytes:
        return {
            "replay": self.before.get(self.victim, b""),
            "another client": other,
            "echo": down,
            "cut": own[:-1],
            "cut tag": own[1:],
            "no tag": own[TAG:],
            "more": own + b"\0",
            "flip": own[:-9] + bytes([own[-9] ^ 1]) + own[-8:],
            "nothing": b"",
        }[self.act]


def everyone(method: Any) -> Any:
    return replace(tiny_run(method, rounds=3), per_round=6)


@pytest.mark.parametrize(
    "act", ["replay", "another client", "echo", "cut", "cut tag", "no tag", "more", "flip", "nothing"]
)
def test_a_meddled_answer_is_refused_and_the_round_goes_on(act: str) -> None:
    meddler = Meddler(act)
    found = list(rounds(open_run(everyone(FedAvg())), meddler))
    assert [len(r.refused) for r in found] == [0, 1, 1]
    for r in found[1:]:
        assert r.refused[0].client == 0
        assert "seal" in r.refused[0].reason
    assert all(torch.isfinite(v).all() for v in found[-1].state.params.values())


def test_each_federation_has_its_own_key() -> None:
    """Messages of the same run in another process's federation do not fit."""
    ours, theirs = open_run(everyone(FedAvg())), open_run(everyone(FedAvg()))
    state = ours.run.method.init(ours.model(), torch.Generator())
    outgoing = Messages(ours).broadcast(1, {0: 0}, {0: ours.run.method.broadcast(state, RoundContext())})
    assert run_client(Worker(ours, kernels="dense"), 1, 0, outgoing[0])[0]
    for t, client, worker in ((1, 0, theirs), (2, 0, ours), (1, 1, ours)):
        with pytest.raises(WireError, match="seal"):
            run_client(Worker(worker, kernels="dense"), t, client, outgoing[0])


def split(first: int) -> Any:
    """A partition function whose first client has so many examples: of one name, whatever they are."""

    def cut(dataset: Dataset, clients: int, seed: int) -> Any:
        return [*torch.arange(len(dataset.train)).split([first, 80 - first, *[40] * 4])]

    return cut


OTHERS: dict[str, dict[str, Any]] = {
    "lr": {"lr": 0.05},
    "batch": {"batch": 5},
    "rounds": {"rounds": 4},
    "seed": {"seed": 1},
    "method": {"method": ZeroFL(0.9, 0.0)},
    "partition": {"task": replace(tiny_run(FedAvg()).task, partition="lda:0.5")},
    "boundaries": {"task": replace(tiny_run(FedAvg()).task, partition=split(31), validation=0.0)},
    "the same again": {},
}


@pytest.mark.parametrize("setting", OTHERS)
def test_messages_of_another_run_with_the_same_key_are_refused_in_both_directions(setting: str) -> None:
    task = replace(tiny_run(FedAvg()).task, partition=split(30), validation=0.0)
    run_ = replace(everyone(FedAvg()), task=task)
    ours, theirs = open_run(run_), open_run(replace(run_, **OTHERS[setting]))
    theirs = replace(theirs, key=ours.key, name=theirs.name if setting == "the same again" else ours.name)
    server, mine = Messages(theirs), Messages(ours)
    params = ours.run.method.init(ours.model(), torch.Generator()).params
    outgoing = server.broadcast(1, {0: 0}, {0: params})
    with pytest.raises(WireError, match="other settings"):
        mine.unseal_broadcast(1, 0, outgoing[0])
    with pytest.raises(WireError, match="other settings"):
        outgoing.decode_reply(0, mine.encode_reply(1, 0, {"n": 1.0}, mine.known(params)))


def test_an_answer_to_another_broadcast_is_refused() -> None:
    federation = open_run(everyone(FedAvg()))
    codec, params = Messages(federation), federation.run.method.init(federation.model(), torch.Generator()).params
    other: Params = {name: v + 1 for name, v in params.items()}
    outgoing = codec.broadcast(1, {0: 0}, {0: params})
    another = codec.broadcast(1, {0: 0}, {0: other})
    reply, _ = run_client(Worker(federation, kernels="dense"), 1, 0, outgoing[0])
    assert set(outgoing.decode_reply(0, reply)) >= {"tree", "n"}
    with pytest.raises(WireError, match="base"):
        another.decode_reply(0, reply)


def test_the_model_just_sent_makes_answers_smaller() -> None:
    """Weights that hardly move cost few bits each: their distance from what both sides hold."""
    moved = list(rounds(open_run(tiny_run(FedAvg(), lr=1e-4, lr_end=1e-4)), local(kernels="dense")))[-1]
    assert moved.bytes_up < 0.8 * moved.bytes_down
    assert moved.bytes_dense_up > moved.bytes_down > 0.7 * moved.bytes_dense_down


@pytest.mark.parametrize("method", [FedAvg(), ZeroFL(0.9, 0.0), FLASH(0.3, c_d=2)], ids=["fedavg", "zerofl", "flash"])
@pytest.mark.slow
def test_rounded_values_make_messages_smaller_and_clients_remember_what_was_lost(method: Any) -> None:
    run_ = tiny_run(method, rounds=3)
    plain = list(rounds(open_run(run_), local(kernels="dense")))
    for values, less in (("bf16", 0.8), ("int8", 0.7), ("int4", 0.6)):
        rounded = list(rounds(open_run(replace(run_, values=values)), local(kernels="dense")))
        assert not any(r.refused for r in rounded)
        assert rounded[-1].bytes_up < less * plain[-1].bytes_up
        memory = decode(next(iter(rounded[-1].memory.values())))
        left = [v for name, v in memory.items() if name.startswith(UNSENT)]
        assert left
        assert all(isinstance(v, torch.Tensor) and torch.isfinite(v).all() for v in left)
        assert any(isinstance(v, torch.Tensor) and v.abs().sum() > 0 for v in left)


@pytest.mark.slow
def test_rounded_runs_are_the_same_at_other_workers_and_after_a_stop() -> None:
    run_ = replace(tiny_run(ZeroFL(0.9, 0.0), rounds=4), values="int8")
    whole = list(rounds(open_run(run_), local(kernels="dense")))
    half = whole[1]
    start = Checkpoint(half.t, flatten(half.state), half.memory)
    for again in (
        list(rounds(open_run(run_), pickled("dense"))),
        list(rounds(open_run(run_), local(kernels="dense"), start=start)),
    ):
        assert again[-1].bytes_up == whole[-1].bytes_up
        flat, other = flatten(whole[-1].state), flatten(again[-1].state)
        assert all(torch.equal(flat[name], other[name]) for name in flat)


def test_what_is_not_finite_is_not_rounded_but_refused() -> None:
    run_ = replace(everyone(FedAvg()), values="int8", lr=1e6, lr_end=1e6)
    with pytest.raises(InputError, match="no client's update could be taken"):
        list(rounds(open_run(run_), local(kernels="dense")))


def test_what_a_client_lost_is_sent_the_next_time() -> None:
    """Two rounds of the same update: what arrives adds up to it twice, but for one rounding's error."""
    codec = Messages(open_run(replace(everyone(FedAvg()), values="int4")))
    name, update = "fc.weight", torch.linspace(-1, 1, 40).view(4, 10)
    memory: dict[str, torch.Tensor] = {"own": torch.ones(1)}
    known, sums = codec.plain, torch.zeros(4, 10)
    for t in (1, 2):
        told = codec.compensate({name: update}, memory)
        back = codec.decode_reply(t, 0, codec.encode_reply(t, 0, told, known), known)[name]
        assert isinstance(back, torch.Tensor)
        sums += back
    assert torch.allclose(sums + memory[UNSENT + name], 2 * update, atol=1e-6)
    assert set(memory) == {"own", UNSENT + name}
