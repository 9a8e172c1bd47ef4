"""The loop: sampling, the learning rate, tiers, refusals, clients that remember."""

import math
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
from fedsieve.methods import FedAvg, HeteroFLASH, SparseFedPP
from fedsieve.types import InputError, RoundContext, Tree, flatten, rng
from tiny import TinyNet, blobs, tiny_run


def test_the_learning_rate_falls_from_lr_towards_lr_end() -> None:
    run_ = tiny_run(FedAvg(), rounds=100, lr=0.1, lr_end=0.001)
    assert run_.lr_at(1) == 0.1
    assert run_.lr_at(51) == pytest.approx(0.1 * (0.001 / 0.1) ** 0.5)
    assert 0.001 < run_.lr_at(100) < 0.00105
    ahead = replace(run_, lr_offset=1)  # rounds count from 1
    assert (ahead.lr_at(0), ahead.lr_at(100)) == (0.1, pytest.approx(0.001))
    assert [ahead.lr_at(t) for t in (1, 50)] == [run_.lr_at(t + 1) for t in (1, 50)]


def test_the_decay_may_be_stretched_over_other_rounds() -> None:
    """As FLASH's public code does: the rate of a round is set after the round before it, from that one's index."""
    run_ = tiny_run(FedAvg(), rounds=400, lr=0.1, lr_end=0.001, lr_rounds=1000, lr_offset=-1)
    lr = 0.1
    for index in range(400):
        assert run_.lr_at(index + 1) == pytest.approx(lr, rel=1e-12)
        lr = 0.1 * math.exp(index / 1000 * math.log(0.001 / 0.1))
    assert run_.lr_at(0) == run_.lr_at(1) == run_.lr_at(2) == 0.1
    short = replace(run_, lr_rounds=100, lr_offset=0)
    assert [short.lr_at(t) for t in (101, 102, 400)] == [pytest.approx(0.001)] * 3  # it stays at lr_end


def test_the_learning_rate_may_fall_in_steps() -> None:
    """PyTorch's MultiStepLR, an epoch a round: the ratio of a step is the second root of lr_end / lr."""
    run_ = tiny_run(FedAvg(), rounds=9, lr=0.1, lr_end=0.001, lr_milestones=(3, 5))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5], gamma=0.1)
    for t in range(1, 10):
        assert run_.lr_at(t) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert [run_.lr_at(t) for t in (0, 3, 4, 5, 6, 9)] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    ahead = replace(run_, lr_offset=1)
    assert [ahead.lr_at(t) for t in (0, 2, 3, 4, 5)] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])
    assert replace(run_, lr_end=0.1).lr_at(9) == 0.1
    assert replace(run_, lr_milestones=[3, 5]) == run_  # type: ignore[arg-type]


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


def test_clients_are_sampled_without_replacement_and_anew_each_round() -> None:
    run_ = replace(tiny_run(FedAvg()), task=Task(TinyNet, blobs, 50), per_round=10)
    samples = [run_.sample(t) for t in range(1, 30)]
    assert all(len(set(s)) == 10 and s == sorted(s) and s[0] >= 0 and s[-1] < 50 for s in samples)
    assert len({tuple(s) for s in samples}) == 29
    assert len({c for s in samples for c in s}) == 50
    assert samples == [run_.sample(t) for t in range(1, 30)]


def test_tiers_are_groups_that_stay_and_are_sampled_in_proportion() -> None:
    task = Task(TinyNet, blobs, 100, tiers=(0.4, 0.3, 0.3))
    run_ = replace(tiny_run(FedAvg()), task=task, per_round=10)
    tiers = [task.tier(c) for c in range(100)]
    assert [tiers.count(i) for i in range(3)] == [40, 30, 30]
    for t in range(1, 9):
        sampled = [tiers[c] for c in run_.sample(t)]
        assert [sampled.count(i) for i in range(3)] == [4, 3, 3]


def test_tiers_of_a_round_are_as_many_but_not_the_same_clients() -> None:
    task = Task(TinyNet, blobs, 100, tiers=(0.4, 0.3, 0.3), tier_by="round")
    run_ = replace(tiny_run(FedAvg()), task=task, per_round=10)
    classes: dict[int, set[int]] = {}
    for t in range(1, 60):
        clients = run_.sample(t)
        assert len(set(clients)) == 10
        assert clients == sorted(clients) == run_.sample(t)
        tiers = run_.tiers(t, clients)
        assert [[*tiers.values()].count(i) for i in range(3)] == [4, 3, 3]
        for client, tier in tiers.items():
            classes.setdefault(client, set()).add(tier)
    assert sum(len(own) > 1 for own in classes.values()) > 80
    assert {*run_.tiers(0, range(100)).values()} == {0}  # all warm up at the largest density
    warm = replace(run_, method=HeteroFLASH(c_d=60))
    assert len(warm.sample(0)) == 60
    assert max(warm.sample(0)) > 40


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


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"per_round": 7}, "per_round is 7 but there are only 6 clients"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"lr": 0.0}, "lr and lr_end must be positive"),
        ({"lr_end": float("nan")}, "lr and lr_end must be positive"),
        ({"lr": 1e300}, "at most 1e6"),
        ({"batch": 2**31}, "batch must be below"),
        ({"momentum": 1.0}, "momentum must lie"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"lr_offset": 2}, "lr_offset must be -1, 0 or 1, got 2"),
        ({"lr_milestones": (5, 3)}, r"lr_milestones must be rounds that rise, such as \(50, 100\), got \(5, 3\)"),
        ({"lr_milestones": (0, 3)}, "lr_milestones must be rounds that rise"),
        ({"lr_milestones": (2.0,)}, "lr_milestones must be rounds that rise"),
        ({"lr_milestones": 3}, "lr_milestones must be rounds that rise, .*, got 3"),
        ({"lr_milestones": (3,), "lr_rounds": 5}, "lr_milestones and lr_rounds are two ways"),
        ({"norm_weight_decay": 1}, "norm_weight_decay must be true or false, got 1"),
        ({"lr_rounds": -1}, r"lr_rounds must be 0 \(all rounds\) or more, got -1"),
    ],
)
def test_impossible_runs_are_refused(change: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line):
        tiny_run(FedAvg(), **change)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"clients": 0}, "task.clients must be at least 1"),
        ({"validation": 1.0}, "task.validation must lie"),
        ({"tiers": (0.5, 0.4)}, "task.tiers must be positive shares that add up to 1"),
        ({"tiers": (0.5, float("nan"))}, "task.tiers must be positive shares that add up to 1"),
        ({"tiers": (0.05, 0.95)}, "leave a tier without a client among 6"),
        ({"model": "resnet19"}, "unknown model 'resnet19'; the models are resnet18"),
        ({"test_limit": -1}, "task.test_limit"),
        ({"tier_by": "round "}, "task.tier_by must be one of client, round"),
        ({"input_mean": 0.5}, r"task.input_mean must be numbers, one or one a channel, such as \(0.5,\), got 0.5"),
        ({"input_mean": (0.5, float("inf"))}, "task.input_mean must be numbers"),
        ({"input_std": (0.5, 0.0)}, r"task.input_std must be positive numbers, .* got \(0.5, 0.0\)"),
        ({"input_std": "1"}, "task.input_std must be positive numbers, .* got '1'"),
    ],
)
def test_impossible_tasks_are_refused(change: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line):
        replace(Task(TinyNet, blobs, 6), **change)


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


def wrong(**changes: Any) -> Any:
    """Return a dataset function with labels (or so) that cannot be."""

    def data() -> Any:
        good = blobs()
        both = ((part, getattr(good, part)) for part in ("train", "test"))
        return replace(good, **{part: replace(d, **{k: v(d) for k, v in changes.items()}) for part, d in both})

    return data


class NormNet(nn.Sequential):
    """BatchNorm over examples alone: one example is none."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(72, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("task", "line"),
    [
        (Task(TinyNet, wrong(y=lambda d: d.y + 1), 6), "training labels must be int64 from 0 to 2"),
        (Task(TinyNet, wrong(y=lambda d: d.y.int()), 6), "got torch.int32"),
        (Task("leaf_cnn", blobs, 6), "model leaf_cnn does not fit blobs: given examples of shape"),
        (Task("digits_net", wrong(x=lambda d: torch.zeros(len(d), 1, 8, 8)), 6), ""),
        (Task(nn.Flatten, blobs, 6), r"it answers \[2, 72\] for 2 examples of 3 classes"),
        (Task(NormNet, blobs, 6, validation=0.0), "batches of 39 leave a client: -s batch=40 leaves none"),
        (Task(NormNet, blobs, 240, validation=0.0), "use fewer clients"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_runs(task: Task, line: str) -> None:
    run_ = replace(tiny_run(FedAvg()), task=task, per_round=1, batch=39)
    if line:
        with pytest.raises(InputError, match=line):
            open_run(run_)
    else:
        open_run(run_)
