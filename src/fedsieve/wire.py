"""The message format: ``encode`` a tree of tensors to bytes, ``decode`` it back exactly.

All numbers are little-endian. A message is ``b"FSV1"`` followed by one tree::

    tree    = u32 number of entries, then each entry
    entry   = u8 kind, u16 length of name, name in UTF-8, body
    kinds   0 tree     body = tree
            1 number   body = f64
            2 dense    body = type, shape, values of all elements
            3 bitmap   body = type, shape, u32 nnz, ceil(numel / 8) bytes (lowest position in the highest bit), values
            4 gaps     body = type, shape, u32 nnz, u32 length, pcodec(gaps as u32), values
            5 vector   body = type, shape, u32 length, pcodec(values): float32 of one dimension only
    type    = u8 (index into float32, float64, float16, bfloat16, int64, int32, uint8, bool)
    shape   = u8 number of dimensions, u32 each
    gaps    = first position, then each position minus the one before it minus one

Of kinds 3 and 4 the encoder takes the smaller, and kind 5 for long vectors, which is what a tensor on a mask that both
sides know is sent as, where it is smaller than kind 2. Trees nest at most 8 deep. Values travel as their bits: what is
decoded equals what was encoded, subnormals, NaNs and -0.0 included.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pcodec import ChunkConfig, standalone
from torch import Tensor

from fedsieve.types import Sparse, Tree

MAGIC = b"FSV1"
TREE, NUMBER, DENSE, BITMAP, GAPS, VECTOR = range(6)
DEEPEST = 8
MOST = 256
"""Values that a packed vector may hold for each of its bytes: bounds what a decoder sets aside."""
LONG = 1024
"""Shorter vectors (biases, BatchNorm) are not worth the packing."""
TYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
_STORED = ("<f4", "<f8", "<f2", "<u2", "<i8", "<i4", "u1", "u1")
_LEVEL = ChunkConfig(compression_level=8)


class WireError(ValueError):
    """The bytes are not exactly one message."""


def encode(tree: Tree) -> bytes:
    """Return the message for a tree of tensors, sparse tensors and numbers."""
    parts: list[bytes | memoryview] = [MAGIC]
    _put_tree(tree, parts, 1)
    return b"".join(parts)


def decode(data: bytes) -> dict[str, Tensor | Sparse | float | Tree]:
    """Return the tree that ``encode`` was given. Raises WireError for anything that is not exactly a message."""
    reader = _Reader(data)
    if reader.take(len(MAGIC)) != MAGIC:
        raise WireError("not a FedSieve message: the first four bytes are not FSV1")
    tree = _get_tree(reader, 1)
    if reader.at != len(data):
        raise WireError(f"{len(data) - reader.at} bytes after the end of the message")
    return tree


def _put_tree(tree: Tree, parts: list[bytes | memoryview], depth: int) -> None:
    if depth > DEEPEST:
        raise WireError(f"trees nest at most {DEEPEST} deep")
    parts.append(struct.pack("<I", len(tree)))
    for name, value in tree.items():
        text = name.encode()
        if isinstance(value, Mapping):
            parts.append(struct.pack("<BH", TREE, len(text)) + text)
            _put_tree(value, parts, depth + 1)
        else:
            kind, body = _leaf(value)
            parts += [struct.pack("<BH", kind, len(text)) + text, *body]


def _leaf(value: Tensor | Sparse | float) -> tuple[int, list[bytes | memoryview]]:
    """Return the kind and the body of an entry that is no tree."""
    if isinstance(value, Tensor):
        if value.dtype == torch.float32 and value.dim() == 1 and len(value) >= LONG:
            packed = standalone.simple_compress(value.detach().cpu().numpy(), _LEVEL)
            if len(packed) + 4 < 4 * len(value) and len(value) <= MOST * len(packed):
                return VECTOR, [_header(value.dtype, tuple(value.shape)), struct.pack("<I", len(packed)), packed]
        return DENSE, [_header(value.dtype, tuple(value.shape)), _bytes(value)]
    if isinstance(value, Sparse):
        return _sparse(value)
    return NUMBER, [struct.pack("<d", value)]


def _sparse(value: Sparse) -> tuple[int, list[bytes | memoryview]]:
    """Return a sparse entry with its positions in the smaller of the two forms."""
    index = value.index.cpu().numpy()
    numel = math.prod(value.shape)
    header, nnz = _header(value.values.dtype, value.shape), struct.pack("<I", len(index))
    if len(index) and (index[0] < 0 or index[-1] >= numel or (np.diff(index) <= 0).any()):
        raise WireError(f"positions must rise strictly and lie below {numel}")
    gaps = standalone.simple_compress(np.diff(index, prepend=-1).astype(np.uint32) - np.uint32(1), _LEVEL)
    if (numel + 7) // 8 <= len(gaps) + 4:
        bits = np.zeros(numel, dtype=bool)
        bits[index] = True
        return BITMAP, [header, nnz, np.packbits(bits).data, _bytes(value.values)]
    return GAPS, [header, nnz, struct.pack("<I", len(gaps)), gaps, _bytes(value.values)]


def _header(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    if dtype not in TYPES:
        raise WireError(f"tensors of {dtype} cannot be sent")
    return struct.pack(f"<BB{len(shape)}I", TYPES.index(dtype), len(shape), *shape)


def _bytes(values: Tensor) -> memoryview:
    """Return the values' own memory, not a copy of it."""
    values = values.detach().cpu().contiguous()
    array = (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy()
    return array.reshape(-1).view(np.uint8).data


class _Reader:
    """A cursor over the message that never reads past its end."""

    def __init__(self, data: bytes):
        self.data, self.at = memoryview(data), 0

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise WireError(
                f"the message ends early: {size} bytes wanted at {self.at}, {len(self.data) - self.at} left"
            )
        self.at += size
        return self.data[self.at - size : self.at]

    def numbers(self, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def values(self, kind: int, numel: int) -> Tensor:
        stored = np.dtype(_STORED[kind])
        array = np.frombuffer(self.take(numel * stored.itemsize), stored).copy()
        if TYPES[kind] == torch.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        if TYPES[kind] == torch.bool:
            if (array > 1).any():
                raise WireError("a boolean that is neither 0 nor 1")
            return torch.from_numpy(array.view(bool))
        return torch.from_numpy(array)


def _get_tree(reader: _Reader, depth: int) -> dict[str, Tensor | Sparse | float | Tree]:
    if depth > DEEPEST:
        raise WireError(f"trees nest deeper than {DEEPEST}")
    tree: dict[str, Tensor | Sparse | float | Tree] = {}
    for _ in range(reader.numbers("<I")[0]):
        kind, length = reader.numbers("<BH")
        try:
            name = str(reader.take(length), "utf-8")
        except UnicodeDecodeError:
            raise WireError("a name that is not UTF-8") from None
        if name in tree:
            raise WireError(f"the name {name!r} comes twice")
        tree[name] = _get_value(reader, kind, depth)
    return tree


def _get_value(reader: _Reader, kind: int, depth: int) -> Tensor | Sparse | float | Tree:
    if kind == TREE:
        return _get_tree(reader, depth + 1)
    if kind == NUMBER:
        return reader.numbers("<d")[0]
    if kind not in (DENSE, BITMAP, GAPS, VECTOR):
        raise WireError(f"unknown kind {kind}")
    dtype, dimensions = reader.numbers("<BB")
    if dtype >= len(TYPES):
        raise WireError(f"unknown type {dtype}")
    shape = reader.numbers(f"<{dimensions}I")
    if math.prod(max(size, 1) for size in shape) >= 2**63:
        raise WireError(f"no tensor has the shape {shape}")
    numel = math.prod(shape)
    if kind == DENSE:
        return reader.values(dtype, numel).view(shape)
    if kind == VECTOR:
        return _vector(reader, dtype, shape)
    (nnz,) = reader.numbers("<I")
    if nnz > min(numel, len(data_left := reader.data[reader.at :])):
        raise WireError(f"{nnz} positions announced in {numel} elements and {len(data_left)} bytes")
    index = _bitmap(reader, numel) if kind == BITMAP else _gaps(reader, nnz)
    if len(index) != nnz or (nnz and index[-1] >= numel):
        raise WireError(f"{nnz} positions announced in {numel} elements, but the positions say otherwise")
    return Sparse(reader.values(dtype, nnz), torch.from_numpy(index), shape)


def _bitmap(reader: _Reader, numel: int) -> npt.NDArray[np.int64]:
    bits = np.unpackbits(np.frombuffer(reader.take((numel + 7) // 8), np.uint8))
    if bits[numel:].any():
        raise WireError("bits set beyond the last element")
    return np.flatnonzero(bits[:numel])


def _gaps(reader: _Reader, nnz: int) -> npt.NDArray[np.int64]:
    gaps = np.empty(nnz, dtype=np.uint32)
    _unpack(reader, gaps, "gaps")
    return np.cumsum(gaps.astype(np.int64) + 1) - 1


def _vector(reader: _Reader, dtype: int, shape: tuple[int, ...]) -> Tensor:
    if TYPES[dtype] != torch.float32 or len(shape) != 1:
        raise WireError(f"a packed vector of type {dtype} and shape {shape}")
    if shape[0] > MOST * (len(reader.data) - reader.at):
        raise WireError(f"{shape[0]} values announced in {len(reader.data) - reader.at} bytes")
    values = np.empty(shape, dtype=np.float32)
    _unpack(reader, values, "values")
    return torch.from_numpy(values)


def _unpack(reader: _Reader, into: npt.NDArray[Any], what: str) -> None:
    """Fill an array from a pcodec frame that holds exactly as many numbers."""
    try:
        progress = standalone.simple_decompress_into(bytes(reader.take(reader.numbers("<I")[0])), into)
    except (RuntimeError, TypeError) as error:
        raise WireError(f"damaged {what}: {error}") from None
    if progress.n_processed != len(into) or not progress.finished:
        raise WireError(f"{len(into)} {what} announced, {progress.n_processed} found")
