"""What messages weigh beside their entropy, the papers' CSR and plain floats, and how fast they come and go.

``fedsieve bench wire`` measures a ResNet-18 of drawn weights in seconds; benchmarks/wire.py, one that was trained.
"""

from __future__ import annotations

import math
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsieve.client.models import ResNet18
from fedsieve.client.process import num_threads
from fedsieve.sparse.csr import csr_bytes
from fedsieve.types import Sparse
from fedsieve.wire import Known, Manifest, decode, encode
from fedsieve.wire.known import NOTHING, Array, array
from fedsieve.wire.values import INT4, INT8, bf16_distance, distance, quantised, to_bf16

DENSITIES = (0.3, 0.2, 0.1, 0.05, 0.01, 0.001)
Params = Mapping[str, "Tensor | Sparse"]


@dataclass(frozen=True)
class Message:
    """A tree to send: ``known`` says in words what ``context`` holds."""

    case: str
    tree: Params
    known: str = "manifest"
    context: Known = field(default=NOTHING, repr=False)
    values: str = "f32"


@dataclass(frozen=True)
class MessageMeasurement:
    """What one message came to. ``entropy_bytes`` is of order 0, tensor by tensor; speeds are of dense float32.

    ``first_*`` are the speeds of the first message against a base, its digest and the order of its magnitudes included;
    the others are those of every further one. ``*_memory`` is what the first one sets aside besides what comes out, in
    sizes of the dense model.
    """

    case: str
    density: float
    known: str
    values: str
    bytes: int
    entropy_bytes: int
    csr_bytes: int
    dense_bytes: int
    encode_mb_s: float
    decode_mb_s: float
    first_encode_mb_s: float
    first_decode_mb_s: float
    encode_memory: float
    decode_memory: float
    position_bytes: int
    """The entropy of the positions alone."""
    churn: float | None
    """The share of the positions that the base's largest, as many, do not hold."""
    bits_per_nonzero: float


def measure_message(message: Message, repeats: int = 5) -> MessageMeasurement:
    """Encode and decode a message with one thread, best of some times, and weigh it."""
    tree, context, values = message.tree, message.context, message.values
    dense = context.manifest.size if context.manifest else float32_bytes(tree)
    nnz = sum(map(_count, tree.values()))
    with num_threads(1):
        content = encode(tree, context, values)
        back = decode(content, context)
        if values == "f32" and not all(_same(v, back[n]) for n, v in tree.items()):
            raise AssertionError(f"{message.case} does not survive")
        calls = (lambda known: encode(tree, known, values), lambda known: decode(content, known))
        first, further = [math.inf] * 2, [math.inf] * 2
        for _ in range(repeats):
            for i, call in enumerate(calls):
                known = replace(context)
                first[i] = min(first[i], cpu_seconds(partial(call, known)))
                further[i] = min(further[i], cpu_seconds(partial(call, known)))
        encode_memory, decode_memory = (_memory(partial(call, replace(context))) / dense for call in calls)
    entropies = [tensor_entropy(name, value, context, values) for name, value in tree.items()]
    return MessageMeasurement(
        case=message.case,
        density=nnz / (dense // 4),
        known=message.known,
        values=values,
        bytes=len(content),
        entropy_bytes=round(sum(map(sum, entropies)) / 8),
        csr_bytes=csr_bytes(tree),
        dense_bytes=dense,
        encode_mb_s=dense / 1e6 / further[0],
        decode_mb_s=dense / 1e6 / further[1],
        first_encode_mb_s=dense / 1e6 / first[0],
        first_decode_mb_s=dense / 1e6 / first[1],
        encode_memory=encode_memory,
        decode_memory=decode_memory,
        position_bytes=round(sum(positions for positions, _ in entropies) / 8),
        churn=churn(tree, context),
        bits_per_nonzero=8 * len(content) / max(nnz, 1),
    )


def random_messages(densities: tuple[float, ...] = DENSITIES) -> Iterator[Message]:
    """Yield messages of a CIFAR ResNet-18 whose weights are normal, and whose base differs from them by a hundredth."""
    generator = torch.Generator().manual_seed(0)
    params = {n: v.detach().clone() for n, v in ResNet18().state_dict().items() if v.is_floating_point()}
    for value in params.values():
        if value.dim() > 1:
            value.normal_(0, math.sqrt(2 / value[0].numel()), generator=generator)
    base = {n: v * (1 + 0.01 * torch.randn(v.shape, generator=generator)) for n, v in params.items()}
    yield from messages_of("drawn, top weights", params, base, densities)


def messages_of(
    name: str, params: Mapping[str, Tensor], base: Params, densities: tuple[float, ...]
) -> Iterator[Message]:
    """Yield a model's largest weights, over all layers together, at every density, known little and known well."""
    manifest = Manifest.of(params)
    for density in densities:
        tree = keep_largest(params, density)
        yield Message(name, tree, "manifest", Known(manifest))
        yield Message(name, tree, "manifest, base", Known(manifest, base))
        for values in ("bf16", "int8", "int4") if density == 0.05 else ():
            yield Message(name, tree, "manifest", Known(manifest), values)
            yield Message(name, tree, "manifest, base", Known(manifest, base), values)


def keep_largest(params: Mapping[str, Tensor], density: float) -> dict[str, Tensor | Sparse]:
    """Return every tensor's share of the largest numbers over all."""
    sizes = torch.cat([v.reshape(-1).abs() for v in params.values()])
    least = sizes.kthvalue(len(sizes) - round(density * len(sizes)) + 1).values
    return {name: Sparse.of(v, v.abs() >= least) for name, v in params.items()}


def tensor_entropy(name: str, value: Tensor | Sparse, known: Known, values: str) -> tuple[float, float]:
    """Return the empirical entropy (order 0) of a tensor's positions and of its values in bits, given what is known."""
    flat = array(value.values if isinstance(value, Sparse) else value)
    if flat.dtype != np.float32:
        return 0.0, 8.0 * flat.nbytes
    words, base = flat.view(np.uint32), known.words(name)
    bits, here = 0.0, base if base is not None and len(base) == len(words) else None
    if isinstance(value, Sparse) and len(value.index) < math.prod(value.shape):
        index, numel = value.index.numpy(), math.prod(value.shape)
        base = base if base is not None and len(base) == numel else None
        bits = _positions(index, numel, base)
        here = None if base is None else base[index]
    lossy = "bf16" if values != "f32" and known.dimensions(name, value.shape) < 2 else values
    if lossy == "bf16":
        rounded = to_bf16(words)
        plain = _floats(rounded.astype(np.uint32) << np.uint32(16), 7)
        if here is None:
            return bits, plain
        return bits, min(plain, len(words) * _entropy(bf16_distance(rounded, to_bf16(here))))
    if lossy != "f32":
        return bits, len(words) * _entropy(quantised(words, INT8 if lossy == "int8" else INT4)[1])
    plain = _floats(words, 23)
    return bits, plain if here is None else min(plain, _steps(distance(words, here)))


def churn(tree: Params, known: Known) -> float | None:
    """Return the share of all sparse positions that are not among the base's largest."""
    new = total = 0
    for name, value in tree.items():
        base = known.words(name)
        if isinstance(value, Sparse) and base is not None and 0 < len(value.index) < len(base):
            sizes = (base & np.uint32(0x7FFFFFFF)).astype(np.int64)
            largest = np.argpartition(-sizes, len(value.index) - 1)[: len(value.index)]
            total += len(value.index)
            new += len(value.index) - len(np.intersect1d(largest, value.index.numpy()))
    return new / total if total else None


def _positions(index: Array, numel: int, base: Array | None) -> float:
    plain = numel * _binary_entropy(len(index) / numel)
    if base is None or not len(index):
        return plain
    way = np.argsort(~(base & np.uint32(0x7FFFFFFF)), kind="stable")
    mask = np.zeros(numel, bool)
    mask[index] = True
    bits = 0.0
    for part in np.array_split(mask[way], min(256, numel)):
        bits += len(part) * _binary_entropy(float(part.mean()))
    return min(plain, bits)


def _floats(words: Array, mantissa: int) -> float:
    """Sign and exponent at their entropy, the mantissa as it is."""
    sign, exponent = words >> np.uint32(31), (words >> np.uint32(23)) & np.uint32(255)
    return len(words) * (_entropy(sign) + _entropy(exponent) + mantissa)


def _steps(steps: Array) -> float:
    """Sign and length of a distance at their entropy, the bits below its highest as they are."""
    sizes = np.abs(steps.astype(np.float64))
    lengths = np.ceil(np.log2(sizes + 1)).astype(np.int64)
    return len(steps) * (_entropy(2 * lengths + (steps < 0))) + float(np.maximum(lengths - 1, 0).sum())


def _entropy(symbols: Array) -> float:
    if not len(symbols):
        return 0.0
    _, counts = np.unique(symbols, return_counts=True)
    shares = counts / len(symbols)
    return float(-(shares * np.log2(shares)).sum())


def _binary_entropy(p: float) -> float:
    return 0.0 if p in (0, 1) else -(p * math.log2(p) + (1 - p) * math.log2(1 - p))


def _count(value: Tensor | Sparse) -> int:
    return len(value.values) if isinstance(value, Sparse) else value.numel()


def float32_bytes(tree: Params) -> int:
    """Return what a tree takes as plain float32."""
    return 4 * sum(math.prod(v.shape) for v in tree.values())


def _same(a: Tensor | Sparse, b: Any) -> bool:
    if isinstance(a, Sparse):
        return isinstance(b, Sparse) and torch.equal(a.index, b.index) and _same(a.values, b.values)
    return bool((array(a).view(np.uint8) == array(b).view(np.uint8)).all())


def _memory(call: Callable[[], object]) -> int:
    """Return the bytes that a call sets aside at its worst moment, besides what it returns."""
    tracemalloc.start()
    result = call()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most - _weight(result)


def _weight(result: object) -> int:
    """Return the bytes of a message, or of a tree's tensors."""
    if isinstance(result, Mapping):
        return sum(map(_weight, result.values()))
    if isinstance(result, Sparse):
        return result.values.nbytes + result.positions.nbytes
    return result.nbytes if isinstance(result, Tensor) else len(result) if isinstance(result, bytes) else 0


def cpu_seconds(call: Callable[[], object]) -> float:
    """Return the processor time that a call takes: others on the machine do not count."""
    began = time.process_time()
    call()
    return time.process_time() - began
