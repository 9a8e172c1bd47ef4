"""Models of a user's own: frozen and shared weights, and what no policy reaches."""

from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from custom_methods import Odd
from fedsieve import Method, Run, local, open_run, rounds
from fedsieve.client.training import load_
from fedsieve.engine.loop import MostlyDense
from fedsieve.engine.messages import Messages
from fedsieve.methods import NST, PDST, FedAvg, Private, TopK, ZeroFL
from fedsieve.runs.progress import show_run
from fedsieve.runs.recorder import record_run, row_of
from fedsieve.sparse.policy import frozen_names, select_weights, tied_names
from fedsieve.types import InputError
from methods_under_test import METHODS
from tiny import PlainNet, TinyNet, tiny_run


class Frozen(TinyNet):
    """A convolution and its BatchNorm that are not to be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2.requires_grad_(False)
        self.bn.requires_grad_(False)
        with torch.no_grad():
            self.bn.running_mean.add_(0.1)  # type: ignore[union-attr, operator]


class FrozenPlain(PlainNet):
    """The same without BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2.requires_grad_(False)


def frozen_run(method: Method[Any], **changes: Any) -> Run:
    net = FrozenPlain if isinstance(method, Private) else Frozen
    tiny = tiny_run(method, **{"weight_decay": 0.01, "momentum": 0.5, **changes})
    return replace(tiny, task=replace(tiny.task, model=net))


@pytest.mark.parametrize(
    ("name", "values"),
    [*((name, "f32") for name in METHODS), ("fedadam", "int8"), ("zerofl top_diff", "bf16"), ("private", "int4")],
)
def test_frozen_weights_stay_bit_for_bit(name: str, values: str) -> None:
    run_ = frozen_run(METHODS[name], rounds=2, values=values)
    federation = open_run(run_)
    before, final = federation.model(), [*rounds(federation, local())][-1]
    fixed = frozen_names(before)
    assert {"conv2.weight"} <= fixed <= {n for n in before.state_dict() if n.startswith(("conv2.", "bn."))}
    assert not final.refused
    for part in fixed:
        assert torch.equal(final.model[part], before.state_dict()[part]), part
        assert torch.equal(final.state.params[part], before.state_dict()[part]), part
    assert any(not torch.equal(v, before.state_dict()[n]) for n, v in final.model.items() if n not in fixed)
    numbers = sum(v.numel() for n, v in before.state_dict().items() if v.is_floating_point() and n not in fixed)
    assert final.bytes_dense_up == 4 * 3 * numbers < final.bytes_dense_down


def test_a_batchnorm_with_one_frozen_half_still_follows_the_data() -> None:
    class Half(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.bn.weight.requires_grad_(False)

    base = tiny_run(FedAvg(), rounds=1)
    *_, final = rounds(replace(base, task=replace(base.task, model=Half)), local())
    assert torch.equal(final.model["bn.weight"], torch.ones(8))
    assert not torch.equal(final.model["bn.running_mean"], torch.zeros(8))


def test_nobody_can_send_what_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Messages, "without_frozen", lambda self, tree: tree)
    with pytest.raises(InputError, match=r"bn\.\w+ is frozen: nobody sends it"):
        [*rounds(frozen_run(FedAvg(), rounds=1), local())]


def test_a_method_of_ones_own_that_says_nothing_keeps_what_is_frozen() -> None:
    method = Odd("remember")
    *_, final = rounds(frozen_run(method, rounds=2), local())
    assert torch.equal(final.model["conv2.weight"], open_run(frozen_run(method)).model().conv2.weight)


def some(**fixed: bool) -> nn.Module:
    model = TinyNet()
    for name in fixed:
        model.get_submodule(name).requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("name", "fixed", "kept"),
    [
        ("all", {"conv2"}, ("conv1", "fc1", "fc2")),
        ("swat", {"conv1"}, ("conv2", "fc1", "fc2")),  # first and last are places in the network
        ("flash", {"fc1"}, ("conv1", "conv2")),
        ("zerofl", {"conv2"}, ("fc1",)),
        ("conv*,fc1", {"conv1"}, ("conv2", "fc1")),
        ("own", {"conv1"}, ("fc1",)),
    ],
)
def test_what_is_frozen_is_in_no_policy(name: str, fixed: set[str], kept: tuple[str, ...]) -> None:
    model = some(**dict.fromkeys(fixed, True))
    model.policies = {"own": ("conv1", "fc1")}  # type: ignore[assignment]
    assert select_weights(name, model) == tuple(f"{layer}.weight" for layer in kept)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("flash", r"policy 'flash' matches no layer that is trained: conv1, conv2, fc1 are frozen .*policy=fc2"),
        ("conv1,fc2", r"policy 'conv1' matches only layers that are frozen .*leave it out; .*policy=fc2"),
    ],
)
def test_a_policy_of_frozen_layers_is_refused(name: str, line: str) -> None:
    with pytest.raises(InputError, match=line):
        select_weights(name, some(conv1=True, conv2=True, fc1=True))


class Tied(nn.Module):
    """Two layers with one weight, and a layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(72, 72)
        self.one, self.two = nn.Linear(72, 72), nn.Linear(72, 72)
        self.two.weight = self.one.weight
        self.again = self.inner
        self.out = nn.Linear(72, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.inner(x.flatten(1)).relu()).relu()
        logits: Tensor = self.out(self.two(self.one(x).relu()).relu())
        return logits


@pytest.mark.parametrize(
    "method", [FedAvg(), TopK(policy="all"), PDST(0.5, "all"), NST(0.5, policy="all"), ZeroFL(policy="all")]
)
def test_shared_weights_are_one_weight_in_every_name(method: Method[Any]) -> None:
    assert tied_names(Tied()) == {f"{m}.{w}" for m in ("inner", "again") for w in ("weight", "bias")} | {
        "one.weight",
        "two.weight",
    }
    base = tiny_run(method, rounds=2)
    *_, final = rounds(replace(base, task=replace(base.task, model=Tied)), local())
    assert not final.model.keys() & {"two.weight", "again.weight", "again.bias"}  # they travel once
    model = load_(Tied(), final.model)
    assert model.two.weight is model.one.weight
    products = isinstance(method, ZeroFL)
    sparse = [name for name in final.state.sparse if name != "out.weight"]
    assert sparse == ([] if products or not method.policy else ["inner.weight", "one.weight"])
    for name in sparse:
        assert 0.05 < float((final.model[name] != 0).float().mean()) < 0.9
    with pytest.raises(InputError, match=r"'one' matches only layers that are frozen .* or share their weights"):
        select_weights("one,out", Tied(), products=True)


class Recurrent(nn.Module):
    """Most of it in a layer that no policy knows."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 32, batch_first=True)
        self.fc = nn.Linear(32, 16)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.lstm(x.flatten(1).view(-1, 6, 12))
        logits: Tensor = self.out(self.fc(h[:, -1]).relu())
        return logits


def recurrent_run(method: Method[Any], **changes: Any) -> Run:
    base = tiny_run(method, rounds=1, **changes)
    return replace(base, task=replace(base.task, model=Recurrent))


def test_what_a_policy_does_not_reach_is_told(tmp_path: Any) -> None:
    said = "dense: lstm.weight_hh_l0, lstm.weight_ih_l0, lstm.bias_ih_l0 (3 more)"
    federation = open_run(recurrent_run(TopK(0.9, policy="fc,out")))
    total = sum(w.numel() for w in Recurrent().parameters())
    share = 1 - (32 * 16 + 16 * 3) / total
    assert federation.coverage is not None
    assert federation.coverage.share == pytest.approx(share)
    assert federation.remarks == [f"the policy fc,out leaves {share:.1%} of all weights {said}"]
    with pytest.warns(MostlyDense, match="the policy fc,out leaves 9"):
        stream = rounds(recurrent_run(TopK(0.9, policy="fc,out")), local())
    *_, final = stream
    whole = {name: v for name, v in final.model.items() if name in dict(Recurrent().named_parameters())}
    assert final.density_of_all == sum(int(v.count_nonzero()) for v in whole.values()) / total > share
    console = Console(file=StringIO(), width=200)
    rows = map(row_of, record_run(tmp_path, federation, local(), "mine"))
    show_run(tmp_path, federation, rows, 1, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert federation.remarks[0] in text
    within = sum(int(final.model[f"{name}.weight"].count_nonzero()) for name in ("fc", "out")) / (32 * 16 + 16 * 3)
    assert final.density_of_policy == within < final.density
    policy = f"{within:.2%} of the policy's; {final.density_of_all:.2%} of all its parameters"
    assert f"of its weights; {policy}" in text
    assert f"density {final.density:.1%} ({within:.1%} of the policy's)" in text


def test_frozen_weights_are_counted_in_one_line() -> None:
    federation = open_run(frozen_run(ZeroFL(0.7)))
    assert federation.remarks == [
        "the policy zerofl leaves 21.7% of all weights dense: conv2.weight, conv1.weight, fc2.weight (5 more)",
        "304 of 2,207 weights are frozen (requires_grad=False): they stay as they are, in no policy, "
        "and are not sent up",
    ]
    assert open_run(tiny_run(FedAvg())).remarks == []
