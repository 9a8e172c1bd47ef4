"""What a training step takes, by the kernels and by PyTorch: counts of what is done, times seconds that were measured.

The seconds a unit are those of one thread, fitted to some hundred steps on one machine (``benchmarks/choice.py``) and
kept here, so that every process, on any machine, chooses alike. Only which of the two ways takes less matters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from fedsieve.kernels.graph import (
    FallbackLayer,
    FlattenLayer,
    Graph,
    NormLayer,
    PoolLayer,
    ProductLayer,
    Value,
)
from fedsieve.kernels.index import UNIT, shared_unit
from fedsieve.kernels.tokens import AttentionLayer, CombinationLayer
from fedsieve.sparse.layers import PowerConv2d, PowerLinear, SwatConv2d, SwatLinear

TOGETHER = 16
"""Samples that the kernels compute together: the last of a batch may be padding."""
KERNELS = {
    "products": 3.41e-11,
    "shared products": 2.09e-11,
    "maps": 1.29e-09,
    "norms": 6.46e-11,
    "windows": 3.62e-10,
    "attention": 1.29e-10,
    "elsewhere": 2.46e-11,
    "passages": 5.66e-09,
    "nonzeros": 4.91e-09,
    "step": 3.60e-05,
}
PYTORCH = {
    "dense products": 1.93e-11,
    "narrow products": 1.15e-11,
    "grouped products": 4.06e-10,
    "norms": 3.74e-09,
    "windows": 2.09e-09,
    "pools": 2.17e-09,
    "attention": 3.36e-10,
    "elsewhere": 2.11e-11,
    "weights": 2.37e-09,
    "calls": 9.42e-05,
    "step": 1.22e-04,
}
"""Seconds a unit of what ``count_work`` counts."""
OF_A_STEP = {"nonzeros", "weights", "calls", "step"}
"""What does not depend on the number of samples."""
ON_SAMPLES = {"elsewhere", "passages"}
"""What the kernels leave to PyTorch, which sees no padding."""
NARROW = 16
"""Input channels below which PyTorch's convolutions are slower."""


def kernel_seconds(counts: Mapping[str, float], samples: int) -> float:
    """Return about what a step on a batch takes the kernels."""
    computed = samples if counts.get("tokens") else padded(samples)
    return sum(each * counts[name] * _times(name, samples, computed) for name, each in KERNELS.items())


def pytorch_seconds(counts: Mapping[str, float], samples: int) -> float:
    """Return about what a step on a batch takes PyTorch."""
    return sum(each * counts[name] * _times(name, samples, samples) for name, each in PYTORCH.items())


def _times(name: str, samples: int, computed: int) -> int:
    return 1 if name in OF_A_STEP else samples if name in ON_SAMPLES else computed


def padded(samples: int) -> int:
    """Return how many samples the kernels compute for so many."""
    return -(-samples // TOGETHER) * TOGETHER


def count_work(
    graph: Graph, density_of: Callable[[ProductLayer], float], is_shared: Callable[[ProductLayer], bool]
) -> dict[str, float]:
    """Return what a training step does on a sample, and once (``OF_A_STEP``), of products of these densities.

    products, shared products   multiply-adds at the densities; those of masks that units of output channels share
    dense products              multiply-adds, were all dense: forward and both gradients
    narrow products             those of convolutions of few channels, 16 / channels times each
    grouped products            those of convolutions of groups
    maps                        numbers that products read and write
    norms                       numbers that BatchNorms, sums and ReLUs of their own give
    windows, pools              numbers that pools look at; that they read and write
    attention                   multiply-adds of attention's forward
    elsewhere, passages         multiply-adds in layers that only PyTorch knows; numbers handed to it, and back
    nonzeros, weights           of the products' weights, on the mask, and all
    calls                       PyTorch's operations
    """
    count = dict.fromkeys((*KERNELS, *PYTORCH), 0.0)
    count["step"] = 1
    count["tokens"] = graph.token_output is not None
    for layer in graph.layers:
        out, both = _size(layer.output), sum(map(_size, (*layer.inputs, layer.output)))
        times = 2 + any(graph.needs_grad[value] for value in layer.inputs)
        if isinstance(layer, ProductLayer):
            numel, of = layer.numel, density_of(layer)
            dense = layer.multiply_adds * (times - 1 + layer.trained)
            narrow = layer.kernel > 1 and layer.shape[1] < NARROW and layer.groups == 1
            kind = "shared products" if is_shared(layer) else "products"
            some = {kind: dense * of, "dense products": dense, "maps": both, "nonzeros": numel * of}
            some |= {"narrow products": dense * NARROW / layer.shape[1] * narrow, "weights": numel, "calls": 1}
            some["grouped products"] = dense * (layer.groups > 1)
        elif isinstance(layer, NormLayer):
            some = {"norms": out, "calls": 1 + (layer.module is not None)}
        elif isinstance(layer, AttentionLayer):
            some = {"attention": 2 * layer.output.channels * layer.pairs, "calls": 1}
        elif isinstance(layer, PoolLayer):
            some = {"windows": out * layer.window.kernel**2, "pools": both, "calls": 1}
        elif isinstance(layer, FallbackLayer):
            weights = list[Tensor]() if layer.module is None else [w for w in layer.module.parameters() if w.dim() > 1]
            numel = sum(w.numel() for w in weights)
            area = layer.output.height * layer.output.width
            some = {"elsewhere": numel * area * times, "passages": both, "weights": numel}
        elif isinstance(layer, FlattenLayer):
            some = {}
        elif isinstance(layer, CombinationLayer):
            terms = len(layer.source)
            some = {"norms": out * terms, "calls": 2 * terms}
        else:  # a function of each number, or of each token's
            some = {"norms": out, "calls": 1}
        for name, number in some.items():
            count[name] += number
    return count


def density(mask: Mapping[str, Tensor], layer: ProductLayer) -> float:
    """Return the share of a layer's weights that training multiplies by."""
    module, own = layer.module, mask.get(layer.weight_name)
    if isinstance(module, SwatConv2d | SwatLinear):
        return module.cut_weight.density
    if (isinstance(module, PowerConv2d | PowerLinear) and module.a > 1) or (own is None and not layer.trained):
        own = module.weight
    return 1.0 if own is None else int(own.count_nonzero()) / own.numel()


def shared(mask: Mapping[str, Tensor], layer: ProductLayer) -> bool:
    """Return whether the kernels compute a layer's output channels by units."""
    own = mask.get(layer.weight_name, None if layer.trained else layer.module.weight != 0)
    if layer.groups > 1 or isinstance(layer.module, SwatConv2d | SwatLinear | PowerConv2d | PowerLinear):
        return False
    return len(layer.module.weight) >= UNIT // 2 if own is None else shared_unit(own) > 1


def _size(value: Value) -> int:
    return value.channels * value.height * value.width
