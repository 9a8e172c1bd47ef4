import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedsieve.client.models import MODELS
from fedsieve.client.training import params_of
from fedsieve.sparse import masks
from fedsieve.sparse import policy as policies
from fedsieve.sparse.policy import select_weights
from fedsieve.types import InputError
from tiny import TinyNet


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, 1e-42, float("inf"), -3.0]), min_size=1, max_size=60),
    st.floats(0.0, 1.0),
)
def test_top_keeps_exactly_the_largest_and_breaks_ties_by_position(values: list[float], q: float) -> None:
    x = torch.tensor(values)
    k = math.ceil(round(q * len(values), 6))
    wanted = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:k]
    assert masks.top(x, q).nonzero().squeeze(1).tolist() == sorted(wanted)


def test_top_counts_with_the_sums_that_the_papers_write() -> None:
    assert masks.topk_count(1 - 0.95 + 0.2, 16) == 4  # 0.25000000000000006 * 16 must not become 5
    assert masks.topk_count(1 - 0.9, 1000) == 100
    assert masks.topk_count(0.05, 21) == 2


def test_top_of_float64_sees_what_float32_cannot() -> None:
    x = torch.tensor([1.0, 1.0 + 1e-12, 1.0], dtype=torch.float64)
    assert masks.top(x, 1 / 3).tolist() == [False, True, False]


def test_top_keeps_the_shape_and_counts_a_nan_as_largest() -> None:
    x = torch.tensor([[1.0, float("nan")], [3.0, 2.0]])
    assert masks.top(x, 0.5).tolist() == [[False, True], [True, False]]


def test_a_global_cut_is_one_cut_over_all_layers() -> None:
    params = {"a": torch.tensor([5.0, 1.0]), "b": torch.tensor([4.0, 3.0, 0.5]), "c": torch.tensor([9.0])}
    support = masks.global_top(params, ("a", "b"), 0.5)
    assert support["a"].tolist() == [True, False]
    assert support["b"].tolist() == [True, True, False]
    assert "c" not in support


def test_a_global_cut_that_empties_a_layer_warns_with_its_name() -> None:
    params = {"big.weight": torch.full((10,), 2.0), "small.weight": torch.ones(10)}
    with pytest.warns(masks.EmptyLayer, match=r"empties small\.weight"):
        masks.global_top(params, ("big.weight", "small.weight"), 0.3)


@pytest.mark.parametrize(
    ("model", "policy", "total", "layers"),
    [
        ("resnet18", "zerofl", 10_985_472, 16),
        ("resnet18", "flash", 1_728 + 10_985_472 + 172_032, 20),
        ("resnet18", "all", 11_173_962 - 9_600 - 10, 21),
        ("resnet18", "swat", 11_173_962 - 9_600 - 10 - 1_728, 20),
        ("leaf_cnn", "zerofl", 32 * 25 + 64 * 32 * 25 + 3136 * 2048, 3),
        ("leaf_cnn", "flash", 32 * 25 + 64 * 32 * 25 + 3136 * 2048, 3),
        ("mnist_net", "flash", 20 * 10 * 25 + 5120 * 50, 2),
        ("mnist_net", "zerofl", 20 * 10 * 25 + 5120 * 50, 2),
        ("digits_net", "zerofl", 32 * 16 * 9 + 512 * 128, 2),
    ],
)
def test_policies_name_the_layers_of_the_papers(model: str, policy: str, total: int, layers: int) -> None:
    shape = {"resnet18": (3, 10), "leaf_cnn": (1, 62)}.get(model, (1, 10))
    net = MODELS[model](*shape)
    names = policies.select_weights(policy, net)
    assert sum(net.get_parameter(name).numel() for name in names) == total
    assert len(names) == layers


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out, self.fc = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False), nn.Linear(6, 6)
        self.out.weight = self.embedding.weight


@pytest.mark.parametrize("policy", ["out", "out.weight", "fc,out"])
def test_a_shared_weight_is_named_by_its_first_name(policy: str) -> None:
    said = (
        r"names out.weight, which is embedding.weight once more \(a shared weight\): name that, and both places have it"
    )
    for products in (False, True):
        with pytest.raises(InputError, match=said):
            select_weights(policy, Tied(), products)
    assert select_weights("emb*", Tied()) == ("embedding.weight",)


def test_weights_of_no_layer_are_named_to_methods_that_replace_layers() -> None:
    reach = "-s method.activations=where_possible reaches every weight"
    with pytest.raises(InputError, match=f"embedding.weight is no weight of a Linear or convolution .*; {reach}"):
        select_weights("fc,embedding", Tied(), products=True)
    with pytest.raises(InputError, match=f"policy 'all' matches no layer; .*; {reach}"):
        select_weights("all", nn.ModuleDict({"lstm": nn.LSTM(2, 2)}), products=True)


def test_a_policy_may_be_patterns_of_layer_names() -> None:
    assert policies.select_weights("conv*, fc1", TinyNet()) == ("conv1.weight", "conv2.weight", "fc1.weight")


@pytest.mark.parametrize("policy", ["nothing", "zerof1", ""])
def test_a_policy_that_matches_no_layer_names_the_layers(policy: str) -> None:
    with pytest.raises(InputError, match="matches no layer; the layers are conv1, conv2, fc1, fc2"):
        policies.select_weights(policy, TinyNet())


@pytest.mark.parametrize("q", [0.02, 0.1, 0.5, 0.9, 1.0])
def test_erdos_renyi_kernel_meets_the_total_and_never_exceeds_one(q: float) -> None:
    params = params_of(TinyNet())
    names = policies.select_weights("all", TinyNet())
    densities = policies.erdos_renyi_kernel(params, names, q)
    sizes = {name: params[name].numel() for name in names}
    assert max(densities.values()) <= 1 + 1e-12
    assert sum(densities[n] * sizes[n] for n in names) == pytest.approx(q * sum(sizes.values()))
    free = [n for n in names if densities[n] < 1]
    scores = [densities[n] * sizes[n] / sum(params[n].shape) for n in free]
    assert scores == pytest.approx([scores[0]] * len(scores)) if free else q >= 0.5


def test_cut_and_density_agree() -> None:
    params = {"w": torch.arange(1.0, 21).view(4, 5), "b": torch.zeros(3)}
    assert masks.weight_density(masks.keep_topk(params, {"w": 0.25})) == 0.25
