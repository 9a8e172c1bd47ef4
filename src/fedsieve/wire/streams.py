"""Streams of whole numbers: packed by pcodec, or by zstandard where pcodec is missing, or left as they are."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from fedsieve.wire.known import Array, WireError

try:
    from pcodec import ChunkConfig, DeltaSpec, ModeSpec, PagingSpec, wrapped
except ImportError:  # the package asks for it, but does without
    wrapped = None
zstandard: Any = import_module("zstandard") if find_spec("zstandard") else None

RAW, PCODEC, ZSTD, BYTES = range(4)
"""How a stream is packed: as it is; by pcodec; its byte planes by zstandard; a byte each."""

BACK_ENDS = ("pcodec", "zstd")
BLOCK = 1 << 22
"""So many numbers make one chunk of pcodec's."""

SHORT = 48
"""Shorter streams are not worth a frame's head."""


def back_ends() -> tuple[str, ...]:
    """Return the back ends that are installed, the better one first."""
    return tuple(name for name, it in zip(BACK_ENDS, (wrapped, zstandard), strict=True) if it is not None)


def packed(numbers: Array, back: str, free: bool = False) -> tuple[int, bytes]:
    """Return how a stream was packed, and its bytes: the smallest of the ways there are.

    ``free``: pcodec is to look for structure in the numbers (multiples, runs) itself; else it takes them as they come.
    """
    if len(numbers) >= SHORT and _constant(numbers.view(f"u{numbers.itemsize}")):
        return _of_constant(numbers[:1].tobytes(), numbers.dtype.str, len(numbers), back, free)
    return _packed(numbers, back, free)


def _constant(bits: Array) -> bool:
    """Tell whether all are the same, as distances are of what nobody changed; in most cases three numbers say no."""
    few = bits[0] == bits[-1] == bits[len(bits) // 2]
    return bool(few) and (bits.strides == (0,) or bool((bits == bits[0]).all()))


@lru_cache(maxsize=256)
def _of_constant(one: bytes, dtype: str, count: int, back: str, free: bool) -> tuple[int, bytes]:
    """Return what ``packed`` does for one number many times."""
    return _packed(np.repeat(np.frombuffer(one, dtype), count), back, free)


def _packed(numbers: Array, back: str, free: bool) -> tuple[int, bytes]:
    best = RAW, numbers.nbytes
    frame: bytes = b""
    if len(numbers) and numbers.itemsize > 1 and numbers.dtype.kind == "u" and int(numbers.max()) < 256:
        best, frame = (BYTES, len(numbers)), numbers.astype(np.uint8).tobytes()
    if len(numbers) >= SHORT:
        way, found = (PCODEC, _pco(numbers, free)) if back == "pcodec" else (ZSTD, _zstd(numbers))
        if len(found) < best[1]:
            best, frame = (way, len(found)), found
    return best[0], frame or numbers.tobytes()


def unpacked(way: int, data: memoryview, count: int, dtype: np.dtype[Any]) -> Array:
    """Return exactly ``count`` numbers. Raises WireError where the bytes do not hold exactly those."""
    if way == RAW:
        if len(data) != count * dtype.itemsize:
            raise WireError(f"{count} numbers announced, {len(data)} bytes found")
        return np.frombuffer(data, dtype).copy()
    if way == BYTES:
        if len(data) != count or dtype.kind != "u":
            raise WireError(f"{count} bytes announced, {len(data)} found")
        return np.frombuffer(data, np.uint8).astype(dtype)
    return _from_pco(bytes(data), count, dtype) if way == PCODEC else _from_zstd(bytes(data), count, dtype)


def _pco(numbers: Array, free: bool) -> bytes:
    """Pack as pcodec's wrapped format: its head, then for every ``BLOCK`` numbers a chunk of one page."""
    file = wrapped.FileCompressor()
    parts = [bytes(file.write_header())]
    plain = {} if free else {"mode_spec": ModeSpec.classic(), "delta_spec": DeltaSpec.no_op()}
    for first in range(0, len(numbers), BLOCK):
        block = numbers[first : first + BLOCK]
        pages = PagingSpec.exact_page_sizes([len(block)])
        chunk = file.chunk_compressor(block, ChunkConfig(compression_level=8, paging_spec=pages, **plain))
        parts += [bytes(chunk.write_meta()), bytes(chunk.write_page(0))]
    return b"".join(parts)


def _from_pco(data: bytes, count: int, dtype: np.dtype[Any]) -> Array:
    if wrapped is None:
        raise WireError("the message was packed by pcodec, which is not installed here")
    into, form = np.empty(count, dtype), f"{dtype.kind}{8 * dtype.itemsize}"
    try:
        file, at = wrapped.FileDecompressor.new(data)
        for first in range(0, count, BLOCK):
            block = into[first : first + BLOCK]
            chunk, read = file.chunk_decompressor(data[at:], form)
            at += read
            progress, read = chunk.read_page_into(data[at:], len(block), block)
            at += read
            if progress.n_processed != len(block) or not progress.finished:
                raise WireError(f"{count} numbers announced, {first + progress.n_processed} found")
    except (RuntimeError, TypeError, ValueError) as error:
        raise error if isinstance(error, WireError) else WireError(f"damaged numbers: {error}") from None
    if at != len(data):
        raise WireError(f"{len(data) - at} bytes after {count} numbers")
    return into


def _zstd(numbers: Array) -> bytes:
    """Pack the planes of bytes, lowest first; signed numbers fold to 0, -1, 1, -2 ... first."""
    if numbers.dtype.kind == "i":
        bits = 8 * numbers.itemsize - 1
        numbers = ((numbers << 1) ^ (numbers >> bits)).view(f"<u{numbers.itemsize}")
    planes = np.ascontiguousarray(numbers.view(np.uint8).reshape(-1, numbers.itemsize).T)
    return bytes(zstandard.ZstdCompressor(level=3).compress(planes.tobytes()))


def _from_zstd(data: bytes, count: int, dtype: np.dtype[Any]) -> Array:
    if zstandard is None:
        raise WireError("the message was packed by zstandard, which is not installed here")
    size = count * dtype.itemsize
    try:
        head = zstandard.get_frame_parameters(data)
        if head.content_size != size or head.dict_id:
            raise WireError(f"{size} bytes announced, a frame of {head.content_size} found")
        plain = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise WireError(f"damaged numbers: {error}") from None
    if len(plain) != size:
        raise WireError(f"{size} bytes announced, {len(plain)} found")
    planes = np.frombuffer(plain, np.uint8).reshape(dtype.itemsize, count)
    numbers = np.ascontiguousarray(planes.T).reshape(-1).view(f"<u{dtype.itemsize}")
    return ((numbers >> 1).view(dtype) ^ -(numbers & 1).view(dtype)) if dtype.kind == "i" else numbers.view(dtype)
