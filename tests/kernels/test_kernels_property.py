"""Nets drawn at random, masked at random, on batches of any size, trained by the kernels and by the dense step."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nets import bn
from stepping import Sgd, assert_as_dense, masks

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("native")]
SIDES, CHANNELS = st.integers(1, 9), st.integers(1, 18)


class Drawn(nn.Module):
    """Layers one after another; at times, the sum with an earlier value of the same shape, or both by channel."""

    def __init__(self, draw: st.DrawFn, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.steps: list[tuple[str, int]] = []
        layers: list[nn.Module] = []
        shapes = [shape]
        for _ in range(draw(st.integers(1, 6))):
            c, h, w = shapes[-1]
            near = [(i, other) for i, other in enumerate(shapes) if other[1:] == (h, w)]
            sums = [("sum", i) for i, other in near if other[0] == c]
            self.steps.append(
                draw(st.sampled_from([("alone", 0), *sums, *(("cat", i) for i, other in near if c < 20)]))
            )
            if self.steps[-1][0] == "cat":
                c += shapes[self.steps[-1][1]][0]
            layers.append(self._layer(draw, c, h, w))
            with torch.no_grad():
                after = layers[-1].eval()(torch.zeros(2, c, h, w)).shape[1:]
            shapes.append((after[0], after[1], after[2]))
        self.layers = nn.ModuleList(layers)
        for norm in (m for m in self.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.uniform_(norm.bias, 0.5, 1)  # ReLU of a channel that is constant is then no matter of rounding
        self.fc = nn.Linear(shapes[-1][0] * shapes[-1][1] * shapes[-1][2], 3)

    @staticmethod
    def _layer(draw: st.DrawFn, c: int, h: int, w: int) -> nn.Module:
        kind = draw(st.sampled_from(["conv", "conv", "conv", "norm", "relu", "max", "mean", "smooth"]))
        if kind == "conv":
            k = draw(st.sampled_from([1, 3, 5]))
            padding = draw(st.integers(max(0, (k - min(h, w) + 1) // 2), k - 1))
            stride = draw(st.sampled_from([1, 1, 2]))
            groups = draw(st.sampled_from([1, 1, *(n for n in range(2, c + 1) if c % n == 0)]))
            outer = groups * draw(st.integers(1, -(-18 // groups)))
            return nn.Conv2d(c, outer, k, stride, padding, groups=groups, bias=draw(st.booleans()))
        if kind == "norm":
            groups = draw(st.sampled_from([0, *(n for n in range(1, c + 1) if c % n == 0 and c // n * h * w > 1)]))
            norm = nn.GroupNorm(groups, c, affine=draw(st.booleans())) if groups else bn(c)
            return nn.Sequential(norm, nn.ReLU()) if draw(st.booleans()) else norm
        if kind == "relu":
            return draw(st.sampled_from([nn.ReLU, nn.ReLU6]))()
        if kind == "smooth":
            return draw(st.sampled_from([nn.Sigmoid, nn.SiLU, nn.GELU, nn.Hardswish]))()
        k = draw(st.integers(1, min(h, w, 3)))
        how = k, draw(st.integers(1, 3)), draw(st.integers(0, k // 2))
        return nn.MaxPool2d(*how) if kind == "max" else nn.AvgPool2d(*how, count_include_pad=draw(st.booleans()))

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for (how, earlier), layer in zip(self.steps, self.layers, strict=True):
            x = values[-1]
            if how != "alone":
                x = x + values[earlier] if how == "sum" else torch.cat([x, values[earlier]], 1)
            values.append(layer(x))
        logits: Tensor = self.fc(values[-1].flatten(1))
        return logits


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_net_trains_as_the_dense_one(data: st.DataObject) -> None:
    torch.manual_seed(0)
    shape = data.draw(st.tuples(CHANNELS, SIDES, SIDES))
    model = data.draw(st.composite(lambda draw: Drawn(draw, shape))())
    density = data.draw(st.sampled_from([0.05, 0.3, 1.0]))
    sizes = data.draw(st.lists(st.integers(2, 34), min_size=1, max_size=3))
    sgd = Sgd(0.02, data.draw(st.sampled_from([0.0, 0.9])), data.draw(st.sampled_from([0.0, 0.01])))
    assert_as_dense(model, shape, sizes, sgd, masks(model, density), classes=3)
