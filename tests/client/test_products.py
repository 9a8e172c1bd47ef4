"""Multiply-adds of models of one's own: those of PyTorch's counter, recurrent layers too, and what nobody can count."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from engines import pickled
from fedsieve import Device, Run, Task, local, open_run, rounds
from fedsieve.client.cost import Cost
from fedsieve.client.models import MODELS
from fedsieve.client.training import Training
from fedsieve.engine.worker import Worker
from fedsieve.kernels import unavailable_reason
from fedsieve.methods import PDST, FedAvg, Swat, TopK
from fedsieve.types import rng
from tiny import TinyNet, blobs, tiny_run


class Net(nn.Module):
    """Layers by name, and what is done with six steps of twelve numbers."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.use = use
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x.flatten(1).view(-1, 6, 12))


def heads(m: Any, h: Tensor) -> Tensor:
    q, k, v = m.qkv(h).view(len(h), 6, 3, 2, 8).permute(2, 0, 3, 1, 4)
    logits: Tensor = m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))
    return logits


def batchwise(m: Any, h: Tensor) -> Tensor:
    """Attention among the examples of a batch: it grows as the square of their number."""
    y = m.a(h.flatten(1))
    logits: Tensor = m.out((y @ y.T).softmax(1) @ y)
    return logits


def linear(*sizes: int) -> nn.Module:
    return nn.Linear(*sizes)


NETS: dict[str, Callable[[], nn.Module]] = {
    "the plain one": TinyNet,
    "attention": lambda: Net(
        lambda m, h: m.out(m.a(h, h, h)[0].mean(1)), a=nn.MultiheadAttention(12, 3, batch_first=True), out=linear(12, 3)
    ),
    "scaled dot products": lambda: Net(heads, qkv=linear(12, 48), out=linear(16, 3)),
    "an encoder": lambda: Net(
        lambda m, h: m.out(m.a(h).mean(1)),
        a=nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 20, batch_first=True), 2),
        out=linear(12, 3),
    ),
    "attention in the batch": lambda: Net(batchwise, a=linear(72, 10), out=linear(10, 3)),
    "Conv1d": lambda: Net(lambda m, h: m.out(m.a(h).mean(2)), a=nn.Conv1d(6, 10, 3), out=linear(10, 3)),
    "ConvTranspose": lambda: Net(
        lambda m, h: m.out(m.b(m.a(h)).mean(2)),
        a=nn.ConvTranspose1d(6, 8, 3),
        b=nn.ConvTranspose1d(8, 4, 2, 2),
        out=linear(4, 3),
    ),
    "a functional weight": lambda: Net(
        lambda m, h: m.out(F.linear(m.b(h), m.a.weight).mean(1)), a=linear(12, 8), b=linear(12, 12), out=linear(8, 3)
    ),
    "a weight made of two": lambda: Net(
        lambda m, h: m.out(F.linear(h.mean(1), m.a.weight @ m.b.weight)),
        a=linear(5, 9),
        b=linear(12, 5),
        out=linear(9, 3),
    ),
    "an unused layer": lambda: Net(lambda m, h: (m.a(h), m.out(h.mean(1)))[1], a=linear(12, 9), out=linear(12, 3)),
    "by keyword": lambda: Net(lambda m, h: m.out(input=m.a(input=h).mean(1)), a=linear(12, 8), out=linear(8, 3)),
    "checkpointed": lambda: Net(
        lambda m, h: m.out(checkpoint(m.a, m.b(h), use_reentrant=False).mean(1)),
        a=linear(9, 8),
        b=linear(12, 9),
        out=linear(8, 3),
    ),
    "frozen at the start": lambda: Net(
        lambda m, h: m.out(m.b(m.a(h)).mean(1)), a=linear(12, 8).requires_grad_(False), b=linear(8, 8), out=linear(8, 3)
    ),
    "frozen in the middle": lambda: Net(
        lambda m, h: m.out(m.b(m.a(h)).mean(1)), a=linear(12, 8), b=linear(8, 8).requires_grad_(False), out=linear(8, 3)
    ),
    "embedded": lambda: Net(
        lambda m, h: m.out(m.a(h[:, :, 0].abs().long() % 5).mean(1)), a=nn.Embedding(5, 7), out=linear(7, 3)
    ),
}


def device_of(model: nn.Module, cost: Cost, n: int = 23, batch: int = 7) -> Device:
    data = blobs().train.subset(torch.arange(n))
    settings: dict[str, Any] = {"lr": 0.01, "epochs": 1, "batch": batch, "momentum": 0.0, "weight_decay": 0.0}
    return Device(model, data, data, rng=rng(0, "test"), steps=cost.begin, **settings)


def counted(make: Callable[[], nn.Module], change: Callable[[nn.Module], nn.Module] = lambda m: m) -> Cost:
    """Train on 23 examples in batches of 7, the last of them of 2."""
    torch.manual_seed(0)
    model = change(make())
    cost = Cost(model, examples=blobs().train.batch(slice(0, 4)))
    list(Training(device_of(model, cost)))
    return cost


@pytest.mark.parametrize("name", NETS)
def test_a_training_multiplies_what_pytorchs_counter_says(name: str) -> None:
    cost = counted(NETS[name])
    torch.manual_seed(0)
    plain = NETS[name]()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        list(Training(device_of(plain, Cost(plain))))
    assert cost.products.dense == counter.get_total_flops() / 2 > 0
    assert cost.products.real == cost.products.dense
    assert cost.other_ops.unknown == ()


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_are_counted_step_by_step(kind: type[nn.Module], gates: int) -> None:
    """Six steps: each multiplies the input and the state; the first state is zeros, and needs no gradient."""
    net = lambda: Net(lambda m, h: m.out(m.a(h)[0][:, -1]), a=kind(12, 16, batch_first=True), out=linear(16, 3))  # noqa: E731
    into, state, out = 6 * 12 * gates * 16, 16 * gates * 16, 16 * 3
    assert counted(net).products.dense == 23 * (2 * into + (6 + 5 + 6) * state + 3 * out)


def test_sparse_layers_count_at_their_densities_and_all_else_as_dense() -> None:
    def masked(model: nn.Module) -> nn.Module:
        model.out.weight.densities = (0.5, 0.25, 0.125)  # type: ignore[attr-defined, union-attr]
        return model

    cost = counted(NETS["attention"], masked)
    out = 23 * 12 * 3
    assert cost.products.dense - cost.products.real == out * (3 - 0.875)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "vit_tiny"])
def test_our_own_models_are_convolutions_and_linear_layers_alone(name: str) -> None:
    sides = {"digits_net": (1, 8)} | dict.fromkeys(("resnet18", "lenet5", "feddst_net"), (3, 32))
    channels, side = sides.get(name, (1, 28))
    cost = Cost(MODELS[name](channels, 10), examples=(torch.randn(4, channels, side, side), torch.zeros(4).long()))
    assert not cost.other_ops
    assert cost.other_ops.unknown == ()
    assert cost.products.dense == 0


class Doubled(torch.autograd.Function):
    """An operation of NumPy's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(2 * x.numpy())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return 2 * grads[0]


def test_what_cannot_be_counted_is_named(tmp_path: Any) -> None:
    net = lambda: Net(  # noqa: E731
        lambda m, h: m.out(h.mean(1) * torch.fft.rfft(h, dim=1).abs()[:, 1] * torch.cdist(h, h).mean()),
        out=linear(12, 3),
    )
    assert counted(net).other_ops.unknown == ("_fft_r2c", "_cdist_forward")
    base = tiny_run(FedAvg(), rounds=1)
    federation = open_run(replace(base, task=replace(base.task, model=net)))
    assert federation.remarks[-1].startswith("multiply-adds not counted: _fft_r2c, _cdist_forward")


def test_counting_disturbs_nothing() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    before, chance = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    Cost(model, examples=blobs().train.batch(slice(0, 4)))
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert torch.equal(chance, torch.get_rng_state())
    assert all(w.grad is None for w in model.parameters())


class Mixed(TinyNet):
    """Layers that the kernels know, and a product of maps that they leave to PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        x = self.bn(self.conv2(x @ x.transpose(2, 3))).relu()
        logits: Tensor = self.fc2(self.fc1(x.flatten(1)).relu())
        return logits


@pytest.mark.parametrize("method", [FedAvg(), PDST(0.2)], ids=lambda m: m.name)
def test_every_way_to_train_counts_the_same(method: Any) -> None:
    base = tiny_run(method, rounds=1)
    run_: Run = replace(base, task=replace(base.task, model=Mixed))
    ways = [local(kernels="dense"), pickled("dense")] + ([] if unavailable_reason() else [local(kernels="sparse")])
    counts = [(r.multiply_adds, r.multiply_adds_dense) for way in ways for r in rounds(run_, way)]
    products = 4 * 6 * 6 * 6  # of maps, forward and for both gradients
    plain = [*rounds(base, local(kernels="dense"))][-1]
    extra = 3 * 36 * products * 3  # of 40 examples, 4 are held out
    assert counts[0][1] == plain.multiply_adds_dense + extra
    assert counts[0][0] == plain.multiply_adds + extra
    assert all(c == pytest.approx(counts[0]) for c in counts)


def test_a_mask_methods_recurrent_layer_counts_at_its_density() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.fc = nn.LSTM(12, 16, batch_first=True), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.fc(self.lstm(x.flatten(1).view(-1, 6, 12))[0][:, -1])
            return logits

    lstm, fc = 6 * 12 * 64 * 2 + 17 * 16 * 64, 16 * 3 * 3
    for method, share in ((PDST(0.5, "all"), 0.5), (TopK(0.5), 1.0), (Swat(0.5, "all"), None)):
        base = tiny_run(method, rounds=1)
        federation = open_run(replace(base, task=Task(Recurrent, blobs, 6)))
        *_, final = rounds(federation, local())
        assert final.multiply_adds_dense == 3 * 40 * (lstm + fc)
        if share:
            assert final.multiply_adds == 3 * 40 * share * (lstm + fc)
        assert sum(map(sum, Worker(federation).cost.other_ops.of_step(8).values())) == 8 * lstm
