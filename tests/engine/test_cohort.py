"""Cohorts train what one client after another trains; their replies, GPUs and settings."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from command_line import CommandLine
from cropped import MOMENTUM, SEVERAL, DropNet, cropped
from fedsieve import Federation, InputError, local, open_run, rounds
from fedsieve.engine import cohort, cohorts, loop
from fedsieve.engine.cohorts import clients_at_once, largest_cohort
from fedsieve.engine.engines import devices_of, in_order, watched
from fedsieve.engine.messages import Messages
from fedsieve.engine.rollback import Memory
from fedsieve.engine.worker import Reply, Worker
from fedsieve.methods import FedAvg
from fedsieve.types import Device, Tree, Update
from methods_under_test import METHODS
from tiny import TinyNet, assert_same, tiny_run


@pytest.mark.parametrize("name", METHODS)
def test_a_cohort_trains_what_one_client_after_another_trains(name: str, one_thread: None) -> None:
    """To the bit; ten are more than a round has."""
    one = cropped(METHODS[name], **MOMENTUM if name in SEVERAL else {})
    if one.task.model is TinyNet:
        one = replace(one, task=replace(one.task, model=DropNet))
    wanted = [*rounds(one, local(kernels="dense"))]
    for n in (1, 3, 10) if name in SEVERAL else (3,):
        for a, b in zip(rounds(one, cohort(n, kernels="dense")), wanted, strict=True):
            assert_same(a, b)
            assert (a.multiply_adds, a.multiply_adds_dense) == (b.multiply_adds, b.multiply_adds_dense)


class Lent(FedAvg):
    """Its clients send the resident model's own tensors, and keep one of them."""

    def client(self, down: Tree, device: Device) -> Update:
        """Train, and copy nothing."""
        update = super().client(down, device)
        device.memory["kept"] = device.model.get_parameter("fc2.bias")
        return replace(update, tree={name: v for name, v in device.model.state_dict().items() if name in update.tree})


@pytest.mark.parametrize(("name", "values"), [("lent", "f32"), ("nst", "bf16")])
def test_a_worker_is_free_while_its_last_client_is_encoded(
    name: str, values: str, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """No reply is encoded before the next client has trained: tensors, diagnostics and memory are each client's own."""
    one = tiny_run(Lent() if name == "lent" else METHODS[name], rounds=2, values=values)
    wanted = [*rounds(open_run(one, measure=("masks",)), local(kernels="dense"))]
    encode, train, trained, encoded = Reply.encode, cohorts.train_client, list[int](), list[int]()
    changed = threading.Condition()

    def note(what: list[int], client: int) -> None:
        with changed:
            what.append(client)
            changed.notify_all()

    def train_noted(worker: Worker, t: int, client: int, *rest: bytes) -> Reply:
        reply = train(worker, t, client, *rest)
        note(trained, client)
        return reply

    def encode_late(reply: Reply) -> tuple[bytes, bytes]:
        with changed:
            enough = min(len(encoded) + 2, one.per_round * reply.t)
            assert changed.wait_for(lambda: len(trained) >= enough, timeout=20)
        message = encode(reply)
        note(encoded, reply.client)
        return message

    monkeypatch.setattr(cohorts, "train_client", train_noted)
    monkeypatch.setattr(Reply, "encode", encode_late)
    federation = open_run(one, measure=("masks",))
    for a, b in zip(rounds(federation, cohort(1, kernels="dense")), wanted, strict=True):
        assert_same(a, b)
        assert a.memory == b.memory
        assert (a.metrics, a.multiply_adds) == (b.metrics, b.multiply_adds)
    assert len(trained) == len(encoded) == 2 * one.per_round


def test_what_fails_in_encoding_ends_the_run(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    encode = Reply.encode

    def failing(reply: Reply) -> tuple[bytes, bytes]:
        if reply.client == clients[1]:
            raise InputError("its tree cannot be sent")
        return encode(reply)

    one = tiny_run(FedAvg(), rounds=1)
    clients = one.sample(1)
    monkeypatch.setattr(Reply, "encode", failing)
    with pytest.raises(InputError, match="its tree cannot be sent"):
        [*rounds(one, cohort(3, kernels="dense"))]


def test_of_a_large_model_a_part_of_a_round_trains_at_once() -> None:
    """Else its answers would come at once, and nobody would train while they are encoded."""
    large, small = nn.Linear(1 << 10, 1 << 10), nn.Linear(1 << 10, 10)
    assert [clients_at_once(large, clients) for clients in (1, 4, 5, 7, 8, 9, 10, 12, 13, 20)] == [
        *(1, 4, 5, 7, 4, 5, 5, 6, 5, 5),
    ]
    assert clients_at_once(large, 10, devices=2) == 5
    assert clients_at_once(large, 20, devices=2) == 5
    assert clients_at_once(small, 20) == 20


def test_a_cohort_decodes_a_broadcast_once(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """But for device classes, of which each is sent its own."""
    bodies, decode = list[int](), Messages.decode_broadcast
    monkeypatch.setattr(Messages, "decode_broadcast", lambda self, body: (bodies.append(1), decode(self, body))[1])
    for name, classes in (("zerofl top_diff", 1), ("hetero_flash", 3)):
        bodies.clear()
        one = tiny_run(METHODS[name], rounds=2)
        if classes > 1:
            one = replace(one, task=replace(one.task, tiers=(0.4, 0.3, 0.3)))
        [*rounds(one, cohort(3, kernels="dense"))]
        assert (len(bodies) == 2) == (classes == 1)


def test_clients_are_at_work_before_anybody_asks_for_a_reply() -> None:
    """No more than may wait, also where answers are counted."""
    begun, memory, answers = list[int](), Memory(), list[tuple[int, ...]]()

    def begin(t: int, client: int, message: bytes) -> Callable[[], tuple[bytes, bytes]]:
        begun.append(client)
        return lambda: (message * t, b"kept" if client == 2 else b"")

    @contextmanager
    def engine(federation: Any, memory: Memory) -> Iterator[Any]:
        yield lambda t, messages: in_order(t, messages, memory, begin, 2)

    with watched(engine, lambda *one: answers.append(one))(None, memory) as exchange:  # type: ignore[arg-type]
        replies = iter(exchange(2, {1: b"a", 2: b"b", 3: b"c"}))
        assert (begun, answers) == ([1, 2], [])
        assert next(replies) == (1, b"aa")
        assert [*replies] == [(2, b"bb"), (3, b"cc")]
    assert (begun, memory, answers) == ([1, 2, 3], {2: b"kept"}, [(2, 1, 3), (2, 2, 3), (2, 3, 3)])


def test_a_cohort_trains_by_the_kernels_too(native: None) -> None:
    one = cropped(METHODS["nst"])
    for a, b in zip(rounds(one, cohort(3, kernels="sparse")), rounds(one, local(kernels="sparse")), strict=True):
        assert_same(a, b)
        assert a.kernels == b.kernels == {"sparse": 3}


def test_answers_are_read_while_others_train(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Where clients train on a GPU: the same rounds, refusals and all, by another thread."""
    one = replace(tiny_run(METHODS["zerofl top_diff"], rounds=2), per_round=6)

    @contextmanager
    def liar(federation: Federation, memory: Memory) -> Iterator[Any]:
        with local(kernels="dense")(federation, memory) as exchange:

            def exchanged(t: int, messages: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
                for client, reply in exchange(t, messages):
                    yield client, b"nonsense" if client == 3 else reply  # type: ignore[misc]
                    if client == 4:
                        yield client, reply  # type: ignore[misc]

            yield exchanged

    wanted = [*rounds(one, liar)]
    assert [len(round_.refused) for round_ in wanted] == [2, 2]
    readers = loop._readers
    monkeypatch.setattr(loop, "_readers", lambda _: readers("cuda"))
    for a, b in zip(rounds(one, liar), wanted, strict=True):
        assert_same(a, b)


def test_bfloat16_trains_float32_weights(one_thread: None) -> None:
    for name in ("fedavg", "swat", "sparsefedpp", "flash"):
        one = tiny_run(METHODS[name], rounds=10, lr=0.2)
        final, exact = ([*rounds(one, cohort(kernels="dense", precision=p))][-1] for p in ("bf16", "fp32"))
        assert all(v.dtype == torch.float32 for v in final.state.params.values())
        assert final.accuracy is not None
        assert exact.accuracy is not None
        assert final.accuracy > exact.accuracy - 0.1
        assert any(not torch.equal(v, exact.state.params[n]) for n, v in final.state.params.items())


def test_several_gpus_are_named_by_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("cuda", "cuda:0", "cuda:0,1"):
        with pytest.raises(InputError, match="is not there: PyTorch sees 0 CUDA devices"):
            devices_of(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_of("cpu") == ["cpu"]
    assert devices_of("cuda") == ["cuda"]
    assert devices_of("cuda:1") == ["cuda:1"]
    assert devices_of("cuda:0,1") == devices_of("cuda:00,1") == ["cuda:0", "cuda:1"]
    for device, line in (
        ("cuda:2", "PyTorch sees 2 CUDA devices"),
        ("cuda:0,0", "names one twice"),
        ("cuda:", "unknown device"),
        ("cuda:0,", "unknown device"),
        ("cuda:-1", "unknown device"),
        ("gpu", "unknown device"),
        ("cpu:0", "unknown device"),
    ):
        with pytest.raises(InputError, match=line):
            devices_of(device)


def test_each_of_several_gpus_has_a_cohort(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Of two processors that stand in for them: twice as many clients train at once, to the same bits."""
    places = list[str]()
    make = cohorts._worker

    def noted(federation: Federation, where: str, *rest: Any, **options: Any) -> Worker:
        places.append(where)
        return make(federation, "cpu", *rest, **options)

    monkeypatch.setattr(cohorts, "devices_of", lambda _: ["cpu", "cpu"])
    monkeypatch.setattr(cohorts, "_worker", noted)
    one = cropped(METHODS["nst"])
    for a, b in zip(rounds(one, cohort(2, kernels="dense")), rounds(one, local(kernels="dense")), strict=True):
        assert_same(a, b)
    assert places == ["cpu"] * 4


def test_a_cohort_is_as_large_as_memory_allows() -> None:
    assert largest_cohort(100.0, 10.0) == 10
    assert largest_cohort(99.0, 10.0) == 9
    assert largest_cohort(5.0, 10.0) == 1
    assert largest_cohort(5.0, 0.0) == 5


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--engine", "cohort:0"], "unknown engine 'cohort:0'"),
        (["-s", "cohort=0"], "unknown engine 'cohort:0'"),
        (["-s", "cohort=many"], "unknown engine 'cohort:many'"),
        (["-s", "cohort=2", "--engine", "pool:2"], "-s cohort=2 is --engine cohort:2, not --engine pool:2"),
        (["--engine", "cohort:-1"], "unknown engine 'cohort:-1'"),
        (["--engine", "cohort:"], "unknown engine 'cohort:'"),
        (["--device", "cuda"], "PyTorch sees 0 CUDA devices"),
        (["--precision", "fp16"], "unknown precision 'fp16'; they are fp32, tf32 and bf16"),
        (["--precision", "tf32"], "--precision tf32 is of GPUs"),
        (["--precision", "bf16"], "--precision bf16 needs --kernels dense on a CPU"),
        (["--precision", "bf16", "--kernels", "dense", "--engine", "pool:2"], "is for --engine local and cohort:N"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(options: list[str], line: str, fedsieve: CommandLine) -> None:
    assert line in fedsieve("run", "flash.digits", *options, code=2).stderr


def test_a_setting_says_how_many_train_at_once(fedsieve: CommandLine, tmp_path: Path) -> None:
    fedsieve("run", "fedavg.digits", "-s", "rounds=1", "-s", "cohort=2", "--out", str(tmp_path / "run"))
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (manifest["engine"], manifest["precision"]) == ("cohort:2", "fp32")
    assert "cohort" not in manifest["run"]
    other = ("--precision", "bf16", "--kernels", "dense", "--resume", "--out", str(tmp_path / "run"))
    line = fedsieve("run", "fedavg.digits", "-s", "rounds=1", *other, code=2).stderr
    assert "was begun with --" in line


def test_with_a_negative_number_there_is_no_cohort() -> None:
    with pytest.raises(InputError, match="a cohort needs at least 1 client, got -1"):
        cohort(-1)
    with pytest.raises(InputError, match="unknown kernels"):
        cohort(1, kernels="fast")
    [*rounds(tiny_run(FedAvg(), rounds=1), cohort())]
