"""Where the numbers of a tensor stand: in a value of the kernels, in a parameter, in the model's input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsieve.kernels.checks import Unsupported
from fedsieve.kernels.graph import Value

SAMPLES = 2
"""Samples of the batch whose places are followed."""


@dataclass
class Places:
    """A tensor of the model: where in a value's, a parameter's or the input's numbers each of its own stands."""

    of: Value | Tensor
    index: Tensor
    """int64, shaped as the tensor."""


@dataclass
class TokenRows:
    """Some tokens' channels, from ``first`` on: which tokens of the batch, in which order."""

    value: Value
    ids: Tensor
    """int64 [...], shaped as the tensor without its channels."""
    first: int
    channels: int


def arguments_of(x: Any) -> Iterator[Any]:
    """Yield what lists, tuples and dictionaries of arguments hold."""
    if isinstance(x, list | tuple):
        for one in x:
            yield from arguments_of(one)
    elif isinstance(x, dict):
        for one in x.values():
            yield from arguments_of(one)
    else:
        yield x


def indices(args: Any) -> Any:
    """Return arguments with the places of the numbers for the numbers."""
    if isinstance(args, list | tuple):
        return type(args)(indices(one) for one in args)
    if isinstance(args, dict):
        return {name: indices(one) for name, one in args.items()}
    return args.index if isinstance(args, Places) else args


def pair(x: Any) -> tuple[int, int]:
    """Return a number for both directions, or one for each."""
    sizes = [x] * 2 if isinstance(x, int) else [*x] * (2 // len(x))
    return int(sizes[0]), int(sizes[1])


def by_sample(ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of tokens in a value that has these alone, and where in a sample of the old they come from."""
    sample = ids // length
    source = (ids % length)[sample == 0]
    new = torch.empty_like(ids)
    for n in range(SAMPLES):
        own = sample == n
        if int(own.sum()) != len(source) or not torch.equal((ids % length)[own], source):
            raise Unsupported("tokens that differ from sample to sample")
        new[own] = n * len(source) + torch.arange(len(source))
    return new, source


def head_rows(x: Any, length: int) -> tuple[Value, int, int, Tensor]:
    """Return the value, the first channel and the heads of [n, heads, length, size], and its tokens [n, length]."""
    if not isinstance(x, Places) or not isinstance(x.of, Value) or x.of.plain or x.index.dim() != 4:
        raise Unsupported("attention of tensors that are not [n, heads, length, size] of tokens")
    wide, index = x.of.channels, x.index
    ids, first = index[:, 0, :, 0] // wide, int(index[0, 0, 0, 0]) % wide
    start = index[0, :, 0, 0] % wide - first
    heads = len({*start.tolist()})
    size = index.shape[-1]
    want = torch.arange(heads).repeat_interleave(len(start) // heads) * size
    full = (ids * wide + first)[:, None, :, None] + start[None, :, None, None] + torch.arange(size)
    inside = ids.shape == (SAMPLES, x.of.width) and x.of.width == length
    plain = inside and torch.equal(ids.flatten(), torch.arange(ids.numel()))
    plain = plain and first + heads * size <= wide
    if not plain or not torch.equal(start, want) or not torch.equal(index, full):
        raise Unsupported("attention of heads that are not successive channels of all tokens")
    return x.of, first, heads, ids


def token_offsets(index: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return which token of the batch each is of the input's numbers [..., channels], and where in a sample they stand.

    A number of a sample, which has ``size``, stands at the sum of its token's offset and its channel's.
    """
    flat = index.flatten(0, -2)
    first, channel = flat[:, 0], flat[0] - flat[0, 0]
    length = len(first) // SAMPLES
    token = (first % size)[first // size == 0]
    ids = torch.empty_like(first)
    for n in range(SAMPLES):
        own = first // size == n
        if int(own.sum()) != length or not torch.equal(first[own] - n * size, token):
            raise Unsupported("samples that are cut into tokens each in its own way")
        ids[own] = n * length + torch.arange(length)
    if not torch.equal(flat, first.unsqueeze(-1) + channel):
        raise Unsupported("numbers of the input in an order that is none of tokens and channels")
    return ids.view(index.shape[:-1]), token, channel
