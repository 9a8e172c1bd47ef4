"""Weights that a model computes with wherever it uses them: right gradients, and nothing left behind."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from fedsieve import Data, Dataset, Run, Task, methods
from fedsieve.client.training import load_, params_of
from fedsieve.engine.setup import open_run
from fedsieve.engine.worker import kernels_for
from fedsieve.sparse.effective import effective_weights, powerprop_where_possible_, swat_where_possible_
from fedsieve.sparse.layers import sparse_layers
from fedsieve.sparse.policy import select_weights
from fedsieve.types import InputError


class Several(nn.Module):
    """Recurrent, attending, bare and tied weights, an embedding, a layer that is called and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.attention = nn.LSTM(6, 8, batch_first=True), nn.MultiheadAttention(8, 2, batch_first=True)
        self.embedding, self.matrix = nn.Embedding(5, 8), nn.Parameter(torch.randn(8, 8) / 3)
        self.called, self.head = nn.Linear(8, 8), nn.Linear(8, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.lstm(x.view(-1, 4, 6))[0] + self.embedding((x[:, :4].abs() * 3).long() % 5)
        h = self.attention(h, h, h)[0] @ self.matrix
        y: Tensor = self.head(self.called(h.mean(1)).tanh())
        return y


def top_half(w: Tensor) -> Tensor:
    kept = torch.zeros(w.numel())
    kept[w.abs().flatten().argsort(descending=True, stable=True)[: w.numel() // 2]] = 1
    return w * kept.view_as(w)


@pytest.mark.parametrize("power", [False, True])
def test_gradients_are_those_of_the_effective_weights_wherever_they_are_used(power: bool) -> None:
    torch.manual_seed(0)
    plain = Several()
    x, names = torch.randn(3, 24), select_weights("all", plain)
    prepared = copy.deepcopy(plain)
    if power:
        powerprop_where_possible_(prepared, names, 1.5)
    else:
        swat_where_possible_(prepared, dict.fromkeys(names, 0.5), 1)
    make: Callable[[Tensor], Tensor] = (lambda w: w.sign() * w.abs() ** 1.5) if power else top_half
    effective = {name: make(plain.get_parameter(name).detach()).requires_grad_() for name in names}
    own = {name: w for name, w in plain.named_parameters() if name not in names}
    # a dictionary of first names: functional_call gives tied weights the same tensor
    expected = functional_call(plain, effective | own, (x,))
    for mode in (nn.Module.train, nn.Module.eval):
        assert torch.allclose(mode(prepared)(x), expected, atol=1e-6)
    prepared.train()(x).square().sum().backward()
    expected.square().sum().backward()
    assert [*sparse_layers(prepared)] == ["attention.out_proj", "called"]
    for name, w in prepared.named_parameters():
        wanted = (effective | own)[name].grad
        if name in names and power:  # d sign(th)|th|^a = a |th|^(a - 1)
            wanted = wanted * 1.5 * plain.get_parameter(name).abs().sqrt()
        if name != "called.weight":  # whose input is cut, as test_layers has it
            assert torch.allclose(w.grad, wanted, atol=1e-5), name


def test_a_call_leaves_the_model_as_it_was_also_when_it_fails() -> None:
    model = swat_where_possible_(Several(), dict.fromkeys(select_weights("all", Several()), 0.5), 1)
    before, keys = dict(model.named_parameters()), [*model.state_dict()]
    assert keys == [*Several().state_dict()]
    x = torch.randn(3, 24)
    y = model.eval()(x)
    with pytest.raises(RuntimeError):
        model(x[:, :7])
    assert all(w is before[name] for name, w in model.named_parameters())
    model.train()(x)
    assert all(w is before[name] for name, w in model.named_parameters())
    assert [*model.state_dict()] == keys
    assert all(a is b for a, b in zip(model.lstm._flat_weights, model.lstm.parameters(), strict=True))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [*effective_weights(other)] == [*effective_weights(model)]
        assert torch.equal(other.eval()(x), y)
        with torch.no_grad():
            other.lstm.weight_ih_l0.zero_()
        assert not torch.equal(other(x), y)
    assert torch.equal(model.eval()(x), y)


class Hidden(nn.Module):
    """A layer beside a matrix that is used as ``how`` says."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.first, self.matrix = how, nn.Linear(6, 8), nn.Parameter(torch.randn(8, 4))
        self.kept = [self.matrix]

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        if self.how == "checkpoint":
            y: Tensor = checkpoint(lambda h: (h @ self.matrix).tanh() @ self.matrix.T, h, use_reentrant=False)[:, :4]
            return y
        return h @ (self.matrix if self.how == "fair" else self.kept[0])


METHODS = (
    methods.Swat(0.5, policy="all", activations="where_possible"),
    methods.ZeroFL(0.5, policy="all", activations="where_possible"),
    methods.SparseFedPP(0.5, activations="where_possible"),
)


def run_of(how: str, method: methods.Swat) -> Run:
    data = Data(torch.randn(16, 6), torch.arange(16) % 4)
    dataset = Dataset("hidden", data, data, tuple("abcd"))
    task = Task(model=Hidden(how), dataset=dataset, clients=2, partition="iid")
    return Run(task=task, method=method, rounds=1, per_round=1)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_what_the_parameters_do_not_tell_is_found_by_comparing(method: methods.Swat) -> None:
    open_run(run_of("fair", method))
    with pytest.raises(InputError, match=r"the model keeps matrix elsewhere than in its parameters"):
        open_run(run_of("list", method))
    with pytest.raises(InputError, match=r"the gradient of \S+ is not that of the weights .*activation checkpointing"):
        open_run(run_of("checkpoint", method))


def test_the_kernels_leave_it_to_pytorch_and_say_why() -> None:
    with pytest.raises(InputError, match=r"kernels sparse cannot be: .*where_possible.*choose auto or dense"):
        kernels_for(open_run(run_of("fair", METHODS[0])), "sparse")


def test_training_and_shipping_compute_with_the_same_weights() -> None:
    """A client's model tests as the plain one that is deployed."""
    plain = Several()
    x = torch.randn(5, 24)
    for method in METHODS:
        state = method.init(plain, torch.Generator())
        prepared = load_(method.prepare(copy.deepcopy(plain)), state.params)
        shipped = load_(copy.deepcopy(plain), method.deploy(state))
        assert torch.allclose(prepared.eval()(x), shipped.eval()(x), atol=1e-5)
        assert params_of(prepared).keys() == state.params.keys()
