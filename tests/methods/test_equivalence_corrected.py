"""FedProx and SCAFFOLD beside a NumPy reference, round by round, and FedAvg, where they are the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedsieve import local, rounds
from fedsieve.engine import Run
from fedsieve.methods import SCAFFOLD, FedAvg, FedProx, Private
from fedsieve.server.robust import Plain, Trimmed
from fedsieve.types import SGD, AdamW, Device, InputError, Method, RoundContext, rng
from fedsieve.wire import decode
from oracles import reference as ref
from oracles import reference_corrected as corrected
from oracles.side_by_side import (
    BATCH,
    EPOCHS,
    SAMPLED,
    SEED,
    SIZES,
    assert_equal,
    batches,
    chance,
    dataset,
    float64,
    fresh,
)
from tiny import same_state, tiny_run

pytestmark = pytest.mark.usefixtures("one_thread")
LR, DECAY = 0.1, 0.02


def package_rounds(
    method: Method[Any], momentum: float = 0.0
) -> Iterator[tuple[Any, dict[int, dict[str, torch.Tensor]]]]:
    """Yield the server's state and the clients' memories after every round."""
    data, memories = dataset(), dict[int, dict[str, torch.Tensor]]()
    resident, state = method.prepare(fresh()), method.init(fresh(), rng(SEED, "init"))
    for t, clients in enumerate(SAMPLED, start=1):
        context = RoundContext(t, len(SAMPLED), len(SIZES))
        down, updates = method.broadcast(state, context), []
        for c in clients:
            device = Device(
                model=resident,
                data=data[c],
                validation=data[c].subset(torch.arange(0)),
                lr=LR,
                epochs=EPOCHS,
                batch=BATCH,
                momentum=momentum,
                weight_decay=DECAY,
                rng=chance(t, c),
                memory=memories.setdefault(c, {}),
            )
            updates.append(method.client(down, device))
            method.expected(state, context).check(updates[-1].tree)
        state = method.aggregate(state, iter(updates), context)
        yield state, memories


def answers(t: int) -> dict[int, ref.Answer]:
    """Return what the reference's clients of round t train on."""
    data = {c: dataset()[c] for c in SAMPLED[t - 1]}
    orders = {c: batches(SIZES[c], chance(t, c)) for c in data}
    return {c: ref.Answer(d.x.numpy().astype(np.float64), d.y.numpy(), orders[c], LR, DECAY) for c, d in data.items()}


def assert_close(control: ref.State, ours: ref.State) -> None:
    """Compare control variates, differences of weights that are much larger than they."""
    assert set(control) == set(ours)
    for name, wanted in control.items():
        np.testing.assert_allclose(ours[name], wanted, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("mu", [0.3, 3.0])
def test_fedprox_equals_reference(mu: float) -> None:
    state = float64(fresh().state_dict())
    for t, (ours, _) in enumerate(package_rounds(FedProx(mu)), start=1):
        state = corrected.prox_round(state, [*answers(t).values()], mu)
        assert_equal(state, float64(ours.params), f"round {t}")


@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("flower", [False, True])
def test_scaffold_equals_reference(momentum: float, flower: bool) -> None:
    """Model and control variates, the server's and every client's: some clients come in every round, some do not."""
    theirs = corrected.Scaffold(float64(fresh().state_dict()), len(SIZES), momentum, flower, flower)
    method = SCAFFOLD("model", "samples") if flower else SCAFFOLD()
    for t, (ours, memories) in enumerate(package_rounds(method, momentum), start=1):
        theirs.round(answers(t))
        assert_equal(theirs.state, float64(ours.params), f"round {t}")
        assert_close(theirs.control, float64(ours.control))
        for client, own in theirs.own.items():
            assert_close({f"control:{name}": value for name, value in own.items()}, float64(memories[client]))


def test_the_reference_tells_the_variants_apart() -> None:
    """A control variate that is left out, or that counts momentum's steps once, is another training by far."""
    plain = corrected.Scaffold(float64(fresh().state_dict()), len(SIZES), 0.6)
    for t in (1, 2):
        plain.round(answers(t))
    without = float64(fresh().state_dict())
    for t in (1, 2):
        without = ref.mean(
            [corrected.descend(without, a, corrected.zeros(without), momentum=0.6) for a in answers(t).values()],
            [1] * 3,
        )
    assert max(np.abs(plain.state[name] - without[name]).max() for name in without) > 1e-2
    assert corrected.counted(3, 0.5) == 1 + 1.5 + 1.75


def two_rounds(method: Method[Any]) -> list[Any]:
    return [*rounds(tiny_run(method, rounds=2, epochs=2), local(kernels="dense"))]


def test_without_mu_fedprox_is_fedavg_to_the_bit() -> None:
    for a, b in zip(two_rounds(FedProx(mu=0)), two_rounds(FedAvg()), strict=True):
        assert same_state(a.state, b.state)
        assert a.bytes_up == b.bytes_up


def test_the_first_round_of_scaffold_is_fedavgs_to_the_bit_and_the_second_is_not() -> None:
    pairs = zip(two_rounds(SCAFFOLD(weighting="samples")), two_rounds(FedAvg()), strict=True)
    assert [all(torch.equal(v, b.state.params[n]) for n, v in a.state.params.items()) for a, b in pairs] == [
        True,
        False,
    ]


def test_control_variates_of_all_clients_add_up_to_the_servers() -> None:
    """From 0, c stays the mean of all c_i, of clients that have not been asked too."""
    *_, final = rounds(tiny_run(SCAFFOLD(), rounds=5), local())
    memories = [decode(final.memory[client]) for client in final.memory]
    for name, c in final.state.control.items():
        total = sum(memory[f"control:{name}"].double() for memory in memories)
        torch.testing.assert_close(total / 6, c.double(), rtol=1e-4, atol=1e-6)


def test_a_robust_mean_moves_the_servers_control_variate_as_far_as_a_plain_one() -> None:
    """Nothing is trimmed off the mean of three, equal, clients: the only update stands for three."""
    runs = (tiny_run(SCAFFOLD(), rounds=1, mean=mean) for mean in (Plain(), Trimmed(0.0)))
    plain, trimmed = (next(rounds(run_, local())).state for run_ in runs)
    for name, c in plain.control.items():
        torch.testing.assert_close(trimmed.control[name], c)


@pytest.mark.parametrize("changes", [{"optimizer": AdamW()}, {"optimizer": torch.optim.SGD}, {"clip_norm": 1.0}])
def test_scaffold_refuses_what_is_no_sum_of_gradients(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="by SGD alone: leave optimizer and clip_norm out"):
        tiny_run(SCAFFOLD(), **changes)
    assert isinstance(tiny_run(SCAFFOLD(), optimizer=SGD(nesterov=True), momentum=0.5), Run)
    assert tiny_run(FedProx(), **changes)


def test_a_negative_mu_and_private_control_variates_are_refused() -> None:
    with pytest.raises(InputError, match="mu must lie in"):
        FedProx(mu=-1)
    with pytest.raises(InputError, match="scaffold's clients send more than a model"):
        Private(SCAFFOLD())
    assert replace(FedProx(), mu=0.0).mu == 0
