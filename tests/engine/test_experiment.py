"""A run's learning rates, the clients of its rounds, and the classes of its devices."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedsieve import Task
from fedsieve.methods import FedAvg, HeteroFLASH
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
