"""LoRA's adapters compute in every mode of a model: PyTorch's fused encoder layers would leave them out in tests."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fedsieve.client.lora import LoRA, merge_adapters_
from fedsieve.engine.models import resolve_model
from fedsieve.types import InputError


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)


class Wrapped(nn.Module):
    """An adapter of another library's: it has the weight of the layer inside."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor:
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x) + 1
        return result


@torch.no_grad()
def test_an_encoder_in_eval_mode_computes_with_its_adapters() -> None:
    model = LoRA(rank=2, modules="*.linear1,*.linear2").attach_(encoder(), torch.Generator().manual_seed(0)).eval()
    for name, w in model.named_parameters():
        if name.endswith("lora_B.weight"):
            w.fill_(0.5)
    x = torch.randn(3, 5, 8)
    fused = model(x)
    with torch.enable_grad():  # where nothing is fused
        expected = model(x)
    assert torch.allclose(fused, expected, atol=1e-6)
    assert not torch.allclose(fused, encoder().eval()(x), atol=1e-2)
    assert torch.allclose(merge_adapters_(model)(x), expected, atol=1e-5)


@torch.no_grad()
def test_a_users_adapters_are_called_in_eval_mode_too() -> None:
    model, x = encoder(), torch.randn(3, 5, 8)
    model.layers[0].linear1 = Wrapped(model.layers[0].linear1)  # type: ignore[index,union-attr]
    model = resolve_model(model).eval()
    fused = model(x)
    with torch.enable_grad():
        assert torch.allclose(fused, model(x), atol=1e-6)


def doubled(layer: nn.Linear, x: Tensor) -> Tensor:
    return 2 * nn.Linear.forward(layer, x)


@pytest.mark.parametrize("kind", ["a forward", "a hook"])
def test_no_adapter_takes_the_place_of_a_layer_that_is_no_plain_one(kind: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    if kind == "a hook":
        model[1].register_forward_hook(lambda layer, args, output: 2 * output)
    else:
        model[1].forward = partial(doubled, model[1])
    with pytest.raises(InputError, match=r"one in the place of 1 would lack its (own forward|hooks): leave it out"):
        LoRA(rank=2).attach_(model)
    assert LoRA(rank=2, modules="0").attach_(model)
