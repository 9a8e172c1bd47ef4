"""A loss that is no finite number: the line names round, client and step, and what of the run's settings may help."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engines import ENGINES
from fedsieve import AdamW, Data, Dataset, InputError, Regression, Run, Task, local, rounds
from fedsieve.engine.cohorts import cohort
from fedsieve.engine.remedies import remedies
from fedsieve.engine.setup import open_run
from fedsieve.methods import FLASH, FedAvg
from tiny import TinyNet, blobs, tiny_run

BAD = 200
"""The example whose loss is NaN: not among the first, which are looked at before training."""
CALLS: list[bool] = []
"""Whether the batch of each call of the loss had it."""
OWN = "see that task.loss (strange) and its gradient are finite for any output, lower lr (now 0.1) or clip gradients"


def strange(output: Tensor, target: Tensor) -> Tensor:
    CALLS.append(bool((target == 3).any()))
    return F.cross_entropy(output, target.clamp(max=2)) + torch.where(target == 3, torch.nan, 0.0).sum() * output.sum()


def size(output: Tensor, target: Tensor) -> Tensor:
    return output.abs()


def marked() -> Dataset:
    data = blobs()
    assert isinstance(data.train.y, Tensor)
    y = data.train.y.index_fill(0, torch.tensor(BAD), 3)
    return replace(data, train=replace(data.train, y=y))


def odd_run(**changes: Any) -> Run:
    """Two clients, the second of which has the bad example."""
    shards = [[*range(100)], [*range(100, 240)]]
    task = Task(TinyNet, marked, 2, shards, loss=strange, metrics={"size": size})
    return Run(FedAvg(), task, rounds=1, per_round=2, batch=8, **{"lr": 0.1, "lr_end": 0.1} | changes)


def refusal(engine: Any, **changes: Any) -> str:
    (one,) = rounds(odd_run(**changes), engine)
    assert [refused.client for refused in one.refused] == [1]
    assert not one.warnings
    return one.refused[0].reason


def test_the_line_names_the_step_and_what_may_help() -> None:
    CALLS.clear()
    reason = refusal(local(kernels="dense"))
    steps = CALLS[-18:]  # 140 examples in batches of 8
    step = 1 + steps.index(True)
    assert step > 1
    assert reason == (
        f"conv1.weight is not finite, its loss NaN or infinite from step {step} of 18 on: {OWN} (clip_norm=1)"
    )
    half = refusal(cohort(kernels="dense", precision="bf16"))
    assert f"from step {step} of 18 on in bfloat16 (--precision fp32 has more digits): " in half
    assert refusal(cohort()) == refusal(local(kernels="sparse")) == reason


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "pool:2"])
def test_every_engine_brings_the_same_line(name: str) -> None:
    assert "from step " in refusal(ENGINES[name](), clip_norm=5.0)
    assert refusal(ENGINES[name](), clip_norm=5.0) == refusal(local(), clip_norm=5.0)


def test_a_round_of_which_nothing_is_left_ends_with_that_line() -> None:
    run_ = replace(
        odd_run(),
        per_round=1,
        seed=next(s for s in range(9) if replace(odd_run(), per_round=1, seed=s).sample(1) == [1]),
    )
    with pytest.raises(InputError) as caught:
        [*rounds(run_, local())]
    line = str(caught.value)
    assert line.startswith(
        "round 1: no client's update could be taken (client 1: conv1.weight is not finite, its loss NaN"
    )
    assert line.count("lower lr") == 1
    assert "\n" not in line
    assert "bound" not in line


def test_a_loss_that_is_not_finite_while_the_weights_are_is_told_once_a_client() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target.clamp(max=2)) + torch.where(target == 3, torch.inf, 0.0).sum()

    task = replace(odd_run().task, loss=loss)
    (one,) = rounds(replace(odd_run(), task=task), local())
    assert not one.refused
    (warning,) = one.warnings
    assert warning.client == 1
    assert warning.reason.startswith("its loss, NaN or infinite from step ")
    assert "loss" in one.metrics  # of the other client


def test_a_mask_that_is_learned_is_no_exception() -> None:
    run_ = tiny_run(FLASH(density=0.2, c_d=3), lr=1e5, lr_end=1e5)
    with pytest.raises(InputError, match=r"round 0: .*client \d: sensed is not finite, its loss NaN .* step \d+ of 50"):
        [*rounds(run_, local())]


def prices(scale: float, targets: float) -> Run:
    x = torch.arange(80.0).reshape(40, 2) * scale / 79
    data = Dataset("prices", Data(x, x[:, 0] * targets / (scale or 1)), Data(x, x[:, 0]))
    task = Task(lambda: torch.nn.Linear(2, 1), data, 2, loss=Regression())
    return Run(FedAvg(), task, rounds=1, per_round=2, batch=8, lr=0.5, optimizer=AdamW())


def test_what_may_help_goes_by_the_settings_and_the_data() -> None:
    own = remedies(open_run(prices(79.0, 1.0)))
    assert own == "lower lr (now 0.5, for Adam 1e-3 is usual) or clip gradients (clip_norm=1)"
    large = remedies(open_run(replace(prices(7900.0, 500.0), lr=1e-3, clip_norm=2.0)))
    scales = "scale the inputs, which reach 7.9e+03, scale the targets, which reach 494"
    assert large == f"{scales}, lower lr (now 0.001) or lower clip_norm (now 2)"
