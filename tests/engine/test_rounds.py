"""The loop: what is trained, tested, kept and refused in rounds, and chance."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from custom_methods import Odd
from fedsieve import Device, Method, Run, ServerState, Task, Update, local, pool, rounds
from fedsieve.client.evaluation import accuracy
from fedsieve.client.training import load_
from fedsieve.data.partition import hold_out
from fedsieve.engine.rollback import Checkpoint
from fedsieve.engine.round import Round
from fedsieve.engine.setup import open_run
from fedsieve.methods import FedAvg, SparseFedPP
from fedsieve.types import InputError, RoundContext, Tree, flatten, rng
from tiny import TinyNet, blobs, tiny_run


def test_what_all_clients_hold_out_is_tested_beside_the_test_set() -> None:
    """The share of the deployed model's right answers on every client's held-out examples, none of them trained on."""
    run_ = tiny_run(FedAvg(), evaluate_every=2)
    run_ = replace(run_, task=replace(run_.task, validation=0.2))
    federation = open_run(run_)
    found = [*rounds(federation, local())]
    model, every = load_(federation.model(), found[-1].model), list[torch.Tensor]()
    for client in range(6):
        device = federation.device(1, client, model, "cpu", {})
        assert (len(device.data), len(device.validation)) == (32, 8)
        every.append(device.validation.x)
    index = torch.cat([hold_out(shard, 0.2, 0, client)[1] for client, shard in enumerate(federation.shards)])
    assert torch.equal(torch.cat(every), federation.dataset.train.x[index])
    assert found[-1].accuracy_validation == accuracy(model, federation.dataset.train.subset(index))
    assert [r.accuracy_validation is None for r in found] == [True, False, True, False]
    none = replace(run_, rounds=1, task=replace(run_.task, validation=0.0))
    assert all(r.accuracy_validation is None for r in rounds(none, local()))


def test_the_initialisation_is_the_experiments_whatever_the_method() -> None:
    """Every method starts from the same truncated normal draw where the task asks for it, else from the model's."""
    for how in ("model", "truncated_normal"):
        starts = []
        for method in (FedAvg(), SparseFedPP()):
            run_ = tiny_run(method)
            federation = open_run(replace(run_, task=replace(run_.task, initialisation=how)))
            starts.append(method.deploy(method.init(federation.model(), rng(0, "init"))))
        assert all(torch.allclose(v, starts[1][name], atol=1e-7) for name, v in starts[0].items())
        largest = float(starts[0]["conv1.weight"].abs().max())
        assert largest <= 2 / 0.8796 / 18**0.5
        assert (largest > 0.25) == (how != "model")


def test_inputs_are_normalised_as_the_task_says() -> None:
    run_, x = tiny_run(FedAvg()), blobs().train.x[:2]
    for numbers, mean, std in (
        ({}, 0.0, 1.0),
        ({"input_mean": (0.25,)}, 0.25, 1.0),
        ({"input_mean": (0.25, -1), "input_std": (2.0, 4.0)}, (0.25, -1.0), (2.0, 4.0)),
    ):
        federation = open_run(replace(run_, task=replace(run_.task, **numbers)))  # type: ignore[arg-type]
        by_channel = [torch.tensor(v).expand(2).view(1, 2, 1, 1) for v in (mean, std)]
        for data in (federation.dataset.train, federation.dataset.test):
            got, _ = data.batch(slice(0, 2))
            assert torch.equal(got, (data.x[:2] - by_channel[0]) / by_channel[1])
        assert torch.equal(federation.dataset.train.x[:2], x)
    with pytest.raises(InputError, match=r"task\.input_mean must hold one number, or one a channel, got 3"):
        open_run(replace(run_, task=replace(run_.task, input_mean=(0.1, 0.2, 0.3))))


def test_a_method_has_a_default_for_all_but_four_functions_and_is_told_the_round() -> None:
    told: list[tuple[str, RoundContext]] = []

    @dataclass(frozen=True)
    class Plain(Method[ServerState]):
        def init(self, model: nn.Module, rng: torch.Generator) -> ServerState:
            return FedAvg().init(model, rng)

        def broadcast(self, state: ServerState, context: RoundContext) -> Tree:
            told.append(("broadcast", context))
            return state.params

        def client(self, down: Tree, device: Device) -> Update:
            return FedAvg().client(down, device)

        def aggregate(self, state: ServerState, updates: Iterable[Update], context: RoundContext) -> ServerState:
            told.append(("aggregate", context))
            return FedAvg().aggregate(state, updates, context)

    task = Task(TinyNet, blobs, 6, "iid", 0.1, tiers=(0.5, 0.5))
    mine, fedavg = (Run(method, task, 2, 4, batch=8) for method in (Plain(), FedAvg()))
    (*_, last), (*_, other) = (rounds(one, local()) for one in (mine, fedavg))
    assert all(torch.equal(v, other.model[n]) for n, v in last.model.items())
    sent = [[("broadcast", RoundContext(t, 2, 6, tier)) for tier in (0, 1)] for t in (1, 2)]
    assert told == [*sent[0], ("aggregate", RoundContext(1, 2, 6)), *sent[1], ("aggregate", RoundContext(2, 2, 6))]
    method = mine.method
    assert (method.name, method.policy, method.warm_up, method.tiers, method.copies) == ("plain", "", 0, None, 1)
    assert method.target_density is method.uses_rounds is method.pruned(last.state) is None
    assert method.expected(last.state, RoundContext()) is method.spent(1, 4, 6) is None


def everyone(method: Any, **changes: Any) -> Run:
    return tiny_run(method, per_round=6, **changes)


@pytest.mark.parametrize("engine", [local(), pytest.param(pool(2), marks=pytest.mark.system)], ids=["local", "pool"])
def test_clients_remember_between_rounds(engine: Any) -> None:
    seen = [r.metrics["visits"] for r in rounds(everyone(Odd("remember"), rounds=3), engine)]
    assert seen == [1.0, 2.0, 3.0]


def test_memories_travel_with_a_checkpoint() -> None:
    federation = open_run(tiny_run(Odd("remember")))
    whole = list(rounds(federation, local()))
    first = next(iter(rounds(federation, local())))
    start = Checkpoint(1, flatten(first.state), dict(first.memory))
    resumed = list(rounds(federation, local(), start=start))
    assert [r.metrics for r in resumed] == [r.metrics for r in whole[1:]]


def test_an_update_that_is_not_finite_is_refused_and_the_round_goes_on() -> None:
    final: Round
    *_, final = rounds(everyone(Odd("poison"), rounds=2), local())
    assert 0 < len(final.refused) < 6
    assert all("is not finite" in refusal.reason for refusal in final.refused)
    assert all(torch.isfinite(v).all() for v in final.state.params.values())


@pytest.mark.parametrize(("act", "reason"), [("poison all", "is not finite.*lower lr"), ("empty", "from 0 examples")])
def test_a_round_without_a_single_good_update_ends_the_run_and_says_why(act: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"round 1: no client's update could be taken.*{reason}"):
        list(rounds(everyone(Odd(act)), local()))


@pytest.mark.system
def test_a_dead_worker_process_is_named() -> None:
    with pytest.raises(InputError, match="a worker process could not start, or died in round 1"):
        list(rounds(everyone(Odd("die")), pool(2)))


def test_momentum_and_weight_decay_are_sgds() -> None:
    """One client, two batches: against torch's own optimizer."""
    settings: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.01, "rounds": 1, "batch": 30, "epochs": 2}
    run_ = replace(tiny_run(FedAvg(), **settings), task=Task(TinyNet, blobs, 4, validation=0.0), per_round=1)
    federation = open_run(run_)
    (round_,) = rounds(federation, local())
    model = federation.model()
    device = federation.device(1, round_.clients[0], model, "cpu", {})
    optimizer = torch.optim.SGD(model.parameters(), run_.lr, momentum=0.9, weight_decay=0.01)
    for _ in range(2):
        for index in torch.randperm(60, generator=device.rng).split(30):
            x, y = device.data.batch(index)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    for name, value in model.named_parameters():
        torch.testing.assert_close(round_.state.params[name], value.detach())


class DropNet(TinyNet):
    """Chance inside the model itself, and a parameter that no loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)
        self.spare = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.dropout(x))


@pytest.mark.system
def test_chance_inside_a_model_is_the_same_in_every_engine() -> None:
    run_ = replace(tiny_run(FedAvg(), rounds=2), task=Task(DropNet, blobs, 6))
    runs = [[*rounds(run_, engine)][-1] for engine in (local(), local(), pool(2))]
    for name, value in runs[0].state.params.items():
        assert all(torch.equal(value, other.state.params[name]) for other in runs)
    assert torch.equal(runs[0].state.params["spare"], torch.ones(2))


class Drawing(TinyNet):
    """Notes what chance it meets in each training step."""

    drawn: ClassVar[list[float]] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.drawn.append(float(torch.rand(())))
        return super().forward(x)


def test_chance_inside_a_model_is_another_for_every_client_and_round() -> None:
    run_ = replace(tiny_run(FedAvg(), rounds=2, batch=40), task=Task(Drawing, blobs, 6))
    list(rounds(run_, local(kernels="dense")))
    assert len(set(Drawing.drawn[-6:])) == 6  # the last two rounds, of three clients and one step each


def test_training_leaves_the_callers_chance_and_threads_alone() -> None:
    torch.manual_seed(5)
    wanted, n = torch.rand(3), torch.get_num_threads()
    torch.manual_seed(5)
    list(rounds(tiny_run(FedAvg(), rounds=1), local()))
    assert torch.equal(torch.rand(3), wanted)
    assert torch.get_num_threads() == n


def test_what_a_pool_cannot_be_sent_is_named() -> None:
    run_ = replace(tiny_run(FedAvg()), task=Task(lambda: TinyNet(), blobs, 6))
    assert [*rounds(replace(run_, rounds=1), local())]
    with pytest.raises(InputError, match="a pool cannot be sent this run"):
        next(rounds(run_, pool(1)))
