"""Small nets with every odd turn that the reader of models must take: how they are made, and for which samples.

All give four logits.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]
COMMON = (2, 6, 5)


class Net(nn.Module):
    """Layers by name, and what is done with them."""

    def __init__(self, run: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(inner: int, outer: int, k: int = 3, stride: int = 1, padding: int | None = None) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, k, stride, k // 2 if padding is None else padding, bias=False)


def grouped(
    inner: int, outer: int, k: int = 3, stride: int = 1, padding: int | None = None, groups: int = 0
) -> nn.Conv2d:
    """A convolution of groups of channels, as many as there are inputs unless it is said."""
    return nn.Conv2d(
        inner, outer, k, stride, k // 2 if padding is None else padding, groups=groups or inner, bias=False
    )


def biased(inner: int, outer: int, k: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, k, padding=k // 2)


def bn(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


def steep(channels: int) -> nn.BatchNorm2d:
    """BatchNorm that gives numbers beyond 6."""
    norm = bn(channels)
    nn.init.constant_(norm.weight, 5.0)
    return norm


def chain(features: int, *layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 4))


def net(run: Callable[[Net, Tensor], Tensor], features: int = 180, **layers: nn.Module) -> Net:
    """A net whose ``run`` gives the features of its last layer."""
    return Net(lambda m, x: m.fc(run(m, x)), **layers, fc=nn.Linear(features, 4))


def sum_in_place(m: Net, x: Tensor) -> Tensor:
    y = z = m.a(x)
    y += m.b(x)
    return F.relu_(z).flatten(1)


RELU = nn.ReLU
CHAINS: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "BatchNorm without ReLU": (lambda: chain(180, conv(2, 6), bn(6)), COMMON),
    "BatchNorm of the input": (lambda: chain(180, bn(2), conv(2, 6), RELU()), COMMON),
    "BatchNorm of a pooled input": (lambda: chain(12, nn.MaxPool2d(2), bn(2), RELU()), (2, 6, 4)),
    "BatchNorm twice": (lambda: chain(150, conv(2, 6), bn(6), bn(6), RELU(), conv(6, 5)), COMMON),
    "a bias before BatchNorm": (lambda: chain(150, biased(2, 6), bn(6), RELU(inplace=True), biased(6, 5)), COMMON),
    "ReLU before a pool": (lambda: chain(30, biased(2, 6), RELU(), nn.MaxPool2d(2), conv(6, 5)), COMMON),
    "ReLU after a pool": (lambda: chain(60, conv(2, 6), nn.MaxPool2d(3, 1), RELU(), conv(6, 5)), COMMON),
    "a pool of the input": (lambda: chain(36, nn.AvgPool2d(2), biased(2, 6)), COMMON),
    "a pool after BatchNorm": (
        lambda: chain(45, conv(2, 6), bn(6), RELU(), nn.MaxPool2d(3, 2, 1), conv(6, 5)),
        COMMON,
    ),
    "padded means": (
        lambda: chain(80, conv(2, 6), nn.AvgPool2d(3, 2, 1), conv(6, 5), nn.AvgPool2d(2, 1, 1, False, False)),
        COMMON,
    ),
    "convolutions alone": (lambda: chain(224, conv(2, 6), conv(6, 5), conv(5, 4, padding=2)), COMMON),
    "no padding": (lambda: chain(15, conv(2, 6, 5, padding=0), conv(6, 5, padding=0)), (2, 7, 9)),
    "5x5 stride 2": (lambda: chain(60, conv(2, 6, 5, 2), conv(6, 5, 5, 2), conv(5, 5, 5, 2, 4)), (2, 9, 5)),
    "1x1 stride 2": (lambda: chain(20, conv(2, 6, 1, 2), conv(6, 5, 1, 2)), (2, 7, 7)),
    "3x3 stride 2 without padding": (lambda: chain(5, conv(2, 6, 3, 2, 0), conv(6, 5, 3, 2, 0)), (2, 7, 8)),
    "depthwise": (
        lambda: chain(
            45, conv(2, 6), bn(6), RELU(), grouped(6, 6), bn(6), nn.ReLU6(), grouped(6, 12, 5, 2), conv(12, 5)
        ),
        COMMON,
    ),
    "depthwise of the input, without padding": (
        lambda: chain(240, grouped(2, 4, 3, 2, 0), RELU(), grouped(4, 4, 1), grouped(4, 8, 7, 1, 4)),
        (2, 7, 9),
    ),
    "groups": (
        lambda: chain(
            *(84, biased(2, 12), RELU(), grouped(12, 9, 3, 1, 2, 3), bn(9), nn.ReLU6(), grouped(9, 6, 1, 2, 0, 3)),
            *(RELU(), nn.Conv2d(6, 14, 3, 2, 1, groups=2)),
        ),
        (2, 9, 5),
    ),
    "groups on small maps": (lambda: chain(300, grouped(3, 12), RELU(), grouped(12, 12, groups=4)), (3, 5, 5)),
    "GroupNorm": (
        lambda: chain(150, conv(2, 6), nn.GroupNorm(2, 6), RELU(), biased(6, 6), nn.GroupNorm(1, 6), conv(6, 5)),
        COMMON,
    ),
    "GroupNorm of every kind": (
        lambda: chain(
            *(60, nn.GroupNorm(2, 2), conv(2, 12), nn.GroupNorm(3, 12, eps=1e-2), nn.ReLU6(), grouped(12, 12, 5)),
            *(nn.GroupNorm(12, 12, affine=False), nn.SiLU(), conv(12, 10, 3, 2), nn.GroupNorm(5, 10), bn(10)),
            *(nn.MaxPool2d(2, 1), nn.GroupNorm(1, 10, affine=False), conv(10, 5)),
        ),
        (2, 7, 9),
    ),
    "7x7 maps": (lambda: chain(80, conv(2, 6), bn(6), RELU(), conv(6, 5, stride=2)), (2, 7, 7)),
    "wide maps": (lambda: chain(51, conv(2, 4), RELU(), conv(4, 3, stride=2)), (2, 2, 33)),
    "1x1 maps": (lambda: chain(5, conv(2, 6), bn(6), RELU(), conv(6, 5)), (2, 1, 1)),
    "ReLU6": (
        lambda: chain(150, conv(2, 6), steep(6), nn.ReLU6(), biased(6, 6), nn.Hardtanh(0, 6), steep(6), biased(6, 5)),
        COMMON,
    ),
    "smooth activations": (
        lambda: chain(
            *(150, conv(2, 6), bn(6), nn.SiLU(), biased(6, 6), nn.GELU(), conv(6, 6), bn(6), nn.GELU("tanh")),
            *(conv(6, 6), nn.Hardswish(), nn.Sigmoid(), conv(6, 5)),
        ),
        COMMON,
    ),
    "linear layers": (
        lambda: nn.Sequential(nn.Linear(9, 17), RELU(), nn.Linear(17, 16, bias=False), RELU(), nn.Linear(16, 4)),
        (9,),
    ),
    "one linear layer": (lambda: nn.Sequential(nn.Linear(9, 4)), (9,)),
    "an adaptive mean": (
        lambda: chain(6, conv(2, 6), RELU(), nn.AdaptiveAvgPool2d(1), nn.Dropout(0), nn.Identity()),
        COMMON,
    ),
    "an adaptive mean of parts": (lambda: chain(36, biased(2, 6), RELU(), nn.AdaptiveAvgPool2d((3, 2))), (2, 6, 4)),
    "a sequence in a sequence": (
        lambda: chain(180, nn.Sequential(conv(2, 6), nn.Sequential(bn(6), RELU())), nn.Sequential()),
        COMMON,
    ),
}
GRAPHS: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "a sum of two convolutions": (
        lambda: net(lambda m, x: F.relu(m.a(x) + m.b(x)).flatten(1), a=conv(2, 6), b=conv(2, 6, 1)),
        COMMON,
    ),
    "a sum with BatchNorm on both sides": (
        lambda: net(
            lambda m, x: torch.relu(m.p(m.a(x)) + m.q(m.b(x))).mean((2, 3)),
            6,
            **{"a": conv(2, 6), "b": conv(2, 6, 1), "p": bn(6), "q": bn(6)},
        ),
        COMMON,
    ),
    "a sum with GroupNorm on both sides": (
        lambda: net(
            lambda m, x: torch.relu(m.p(m.a(x)) + m.q(m.b(x))).flatten(1),
            a=conv(2, 6),
            b=conv(2, 6, 1),
            p=nn.GroupNorm(2, 6),
            q=nn.GroupNorm(3, 6),
        ),
        COMMON,
    ),
    "a sum with the input": (
        lambda: net(lambda m, x: torch.flatten((m.p(m.a(x)) + x).relu(), 1), 60, a=conv(2, 2), p=bn(2)),
        COMMON,
    ),
    "a sum with a pooled input": (
        lambda: net(lambda m, x: (F.max_pool2d(x, 2) + m.a(x)).relu().flatten(1), 12, a=conv(2, 2, 3, 2)),
        (2, 6, 4),
    ),
    "twice the same": (lambda: net(lambda m, x: (y := m.a(x)).add(y).flatten(1), a=conv(2, 6)), COMMON),
    "a value used three times": (
        lambda: net(
            lambda m, x: (m.b(y := m.p(m.a(x)).relu()) + m.c(y) + y).flatten(1),
            **{"a": conv(2, 6), "p": bn(6), "b": conv(6, 6), "c": conv(6, 6, 5)},
        ),
        COMMON,
    ),
    "ReLU of one of two uses": (
        lambda: net(lambda m, x: (F.relu(y := m.p(m.a(x))) + y).flatten(1), a=conv(2, 6), p=bn(6)),
        COMMON,
    ),
    "ReLU under another name": (
        lambda: net(
            lambda m, x: (F.relu(m.i(y := m.p(m.a(x)))) + y).flatten(1), a=conv(2, 6), p=bn(6), i=nn.Identity()
        ),
        COMMON,
    ),
    "ReLU in place, seen by a later reader": (
        lambda: net(
            lambda m, x: (m.b(m.r(y := m.p(m.a(x)))) + y).flatten(1),
            **{"a": conv(2, 6), "p": bn(6), "r": RELU(inplace=True), "b": conv(6, 6)},
        ),
        COMMON,
    ),
    "ReLU6 of a sum": (
        lambda: net(
            lambda m, x: F.relu6(m.p(m.a(x)) + m.q(m.b(x)), True).flatten(1),
            a=conv(2, 6),
            b=conv(2, 6, 1),
            p=steep(6),
            q=bn(6),
        ),
        COMMON,
    ),
    "activations by name, and in place": (
        lambda: net(
            lambda m, x: (
                m.b(F.silu(y := m.a(x), True))
                + y
                + F.hardtanh(y, 0.0, 6.0)
                + torch.sigmoid(F.gelu(y, approximate="tanh"))
            ).flatten(1),
            a=conv(2, 6),
            b=conv(6, 6),
        ),
        COMMON,
    ),
    "an activation of features and of the input": (
        lambda: Net(lambda m, x: m.g(F.gelu(m.f(F.hardswish(x))).sigmoid()), f=nn.Linear(9, 17), g=nn.Linear(17, 4)),
        (9,),
    ),
    "cat": (
        lambda: net(
            lambda m, x: m.c(torch.cat([m.a(x).relu(), m.b(x), x], dim=1)).flatten(1),
            a=biased(2, 6),
            b=biased(2, 3),
            c=conv(11, 6),
        ),
        COMMON,
    ),
    "cat of the same twice, of other readers, and again": (
        lambda: net(
            lambda m, x: torch.cat(
                (z := torch.concat([y := m.p(m.a(x)).relu(), y, m.b(y)], -3), m.c(z) + y), 1
            ).flatten(1),
            750,
            a=conv(2, 6),
            p=bn(6),
            b=conv(6, 7, 5),
            c=grouped(19, 6, 3, groups=1),
        ),
        COMMON,
    ),
    "cat into a dense block": (
        lambda: net(
            lambda m, x: m.d(
                F.silu(m.s(torch.cat([y := torch.cat([z := m.a(x), m.b(F.relu(m.p(z)))], 1), m.c(F.relu(m.q(y)))], 1)))
            ).flatten(1),
            **{
                "a": conv(2, 5),
                "p": bn(5),
                "b": conv(5, 3),
                "q": bn(8),
                "c": conv(8, 4, 5),
                "s": bn(12),
                "d": conv(12, 6),
            },
        ),
        COMMON,
    ),
    "cat of features": (
        lambda: Net(
            lambda m, x: m.g(torch.cat([m.f(x).relu(), x, m.h(x)], -1)),
            f=nn.Linear(9, 17),
            g=nn.Linear(31, 4),
            h=nn.Linear(9, 5),
        ),
        (9,),
    ),
    "logits that are a cat": (
        lambda: Net(lambda m, x: torch.cat([m.f(x), m.g(x)], 1), f=nn.Linear(9, 3), g=nn.Linear(9, 1)),
        (9,),
    ),
    "a sum in place": (lambda: net(sum_in_place, a=conv(2, 6), b=conv(2, 6)), COMMON),
    "a view": (lambda: net(lambda m, x: m.a(x).relu().view(x.size(0), -1), a=conv(2, 6)), COMMON),
    "a view of a shape": (lambda: net(lambda m, x: torch.reshape(m.a(x), (-1, 180)), a=conv(2, 6)), COMMON),
    "a mean by name": (
        lambda: net(lambda m, x: m.a(x).mean(keepdim=True, dim=(-2, -1)).flatten(start_dim=1), 6, a=conv(2, 6)),
        COMMON,
    ),
    "an adaptive mean by name": (
        lambda: net(lambda m, x: F.adaptive_avg_pool2d(m.a(x), output_size=1).flatten(1), 6, a=conv(2, 6)),
        COMMON,
    ),
    "something that is not used": (
        lambda: net(lambda m, x: (m.q(m.b(x)), m.a(x).flatten(1))[1], a=conv(2, 6), b=conv(2, 3), q=bn(3)),
        COMMON,
    ),
    "logits that are a sum": (
        lambda: Net(lambda m, x: (y := m.f(x)) + m.g(y).relu(), f=nn.Linear(9, 4), g=nn.Linear(4, 4)),
        (9,),
    ),
}
NETS = CHAINS | GRAPHS
