"""Streams of whole numbers: packed by pcodec, or by zstandard where pcodec is missing, or left as they are.

Long ones are packed beside one another, by as many threads as PyTorch computes with.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Self, TypeAlias, TypeVar

import numpy as np

from fedsieve.wire.known import Array, Budget, WireError

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
HEAD, META = 64, (1 << 10, 1 << 16)
"""Bytes that hold the head of pcodec's format, and what says how a chunk is packed, as a rule and at most."""
T = TypeVar("T")

SHORT = 48
"""Shorter streams are not worth a frame's head."""


def back_ends() -> tuple[str, ...]:
    """Return the back ends that are installed, the better one first."""
    return tuple(name for name, it in zip(BACK_ENDS, (wrapped, zstandard), strict=True) if it is not None)


def pack(numbers: Array, back: str, free: bool = False) -> tuple[int, bytes]:
    """Return how a stream was packed, and its bytes: the smallest of the ways there are.

    ``free``: pcodec is to look for structure in the numbers (multiples, runs) itself; else it takes them as they come.
    """
    bits = numbers.view(f"u{numbers.itemsize}")
    constant = len(bits) >= SHORT and bits[0] == bits[-1] == bits[len(bits) // 2]  # in most cases three say no
    if constant and (bits.strides == (0,) or (bits == bits[0]).all()):  # as distances are of what nobody changed
        return _of_constant(numbers[:1].tobytes(), numbers.dtype.str, len(numbers), back, free)
    return _packed(numbers, back, free)


@lru_cache(maxsize=256)
def _of_constant(one: bytes, dtype: str, count: int, back: str, free: bool) -> tuple[int, bytes]:
    """Return what ``pack`` does for one number many times."""
    return _packed(np.repeat(np.frombuffer(one, dtype), count), back, free)


def _packed(numbers: Array, back: str, free: bool) -> tuple[int, bytes]:
    best = RAW, numbers.nbytes
    frame: bytes = b""
    if len(numbers) and numbers.itemsize > 1 and numbers.dtype.kind == "u" and int(numbers.max()) < 256:
        best, frame = (BYTES, len(numbers)), numbers.astype(np.uint8).tobytes()
    if len(numbers) >= SHORT:
        way, data = (PCODEC, _pco(numbers, free)) if back == "pcodec" else (ZSTD, _zstd(numbers))
        if len(data) < best[1]:
            best, frame = (way, len(data)), data
    return best[0], frame or numbers.tobytes()


def unpack(way: int, data: memoryview, into: Array, budget: Budget) -> None:
    """Fill an array with a stream's numbers. Raises WireError where the bytes do not hold exactly so many."""
    count, size = len(into), into.dtype.itemsize
    if len(data) > into.nbytes or (way == RAW and len(data) < into.nbytes):
        raise WireError(f"{count} numbers announced, {len(data)} bytes found")
    if way == RAW:
        into[:] = np.frombuffer(data, into.dtype)
    elif way == BYTES:
        if len(data) != count or into.dtype.kind != "u":
            raise WireError(f"{count} bytes announced, {len(data)} found")
        into[:] = np.frombuffer(data, np.uint8)
    elif way == PCODEC:
        _from_pco(data, into, budget)
    else:
        with budget.lent(count):
            _from_zstd(data, into.view(np.uint8).reshape(count, size))
        if into.dtype.kind == "i":
            with budget.at_work(count) as starts:
                for first in starts:
                    numbers = into[first : first + budget.block].view(f"<u{size}")
                    numbers[:] = (numbers >> 1) ^ -(numbers & 1)


def _pages(count: int) -> list[int]:
    """Return how many numbers of a chunk stand in each of its pages, which are unpacked one by one."""
    many = max(1, min(8, count >> 10), count >> 16)
    return [count // many + (i < count % many) for i in range(many)]


def _pco(numbers: Array, free: bool) -> bytes:
    """Pack as pcodec's wrapped format: its head, then for every ``BLOCK`` numbers a chunk of some pages."""
    file = wrapped.FileCompressor()
    parts = [bytes(file.write_header())]
    plain = {} if free else {"mode_spec": ModeSpec.classic(), "delta_spec": DeltaSpec.no_op()}
    for first in range(0, len(numbers), BLOCK):
        block = numbers[first : first + BLOCK]
        pages = PagingSpec.exact_page_sizes(sizes := _pages(len(block)))
        chunk = file.chunk_compressor(block, ChunkConfig(compression_level=8, paging_spec=pages, **plain))
        parts += [bytes(chunk.write_meta()), *(bytes(chunk.write_page(i)) for i in range(len(sizes)))]
    return b"".join(parts)


def _from_pco(data: memoryview, into: Array, budget: Budget) -> None:
    if wrapped is None:
        raise WireError("the message was packed by pcodec, which is not installed here")
    count, size, form = len(into), into.dtype.itemsize, f"{into.dtype.kind}{8 * into.dtype.itemsize}"
    try:
        file, at = wrapped.FileDecompressor.new(bytes(data[:HEAD]))
        for first in range(0, count, BLOCK):
            chunk, read = _tried(lambda part: file.chunk_decompressor(part, form), data[at:], META, budget)
            at, start = at + read, first
            for many in _pages(len(into[first : first + BLOCK])):
                page, start = into[start : start + many], start + many
                read_page = partial(_page, chunk, page)
                at += _tried(read_page, data[at:], (size * many + HEAD, 2 * size * many + META[-1]), budget)
    except (RuntimeError, TypeError, ValueError) as error:
        raise error if isinstance(error, WireError) else WireError(f"damaged numbers: {error}") from None
    if at != len(data):
        raise WireError(f"{len(data) - at} bytes after {count} numbers")


def _page(chunk: Any, into: Array, data: bytes) -> int:
    """Fill an array from the page of a chunk that begins these bytes; return how many it takes."""
    progress, read = chunk.read_page_into(data, len(into), into)
    if progress.n_processed != len(into) or not progress.finished:
        raise WireError(f"{len(into)} numbers announced, {progress.n_processed} found")
    return int(read)


def _tried(read: Callable[[bytes], T], data: memoryview, sizes: tuple[int, ...], budget: Budget) -> T:
    """Return what is read from the first bytes, which pcodec wants a copy of: few as a rule, or else more."""
    for size in sizes:
        part = data[:size]
        with budget.lent(len(part)):
            try:
                return read(bytes(part))
            except RuntimeError:
                if len(part) == len(data) or size == sizes[-1]:
                    raise
    raise AssertionError


def _zstd(numbers: Array) -> bytes:
    """Pack each plane of bytes, the lowest first, their lengths before; signed numbers fold to 0, -1, 1 ... first."""
    if numbers.dtype.kind == "i":
        bits = 8 * numbers.itemsize - 1
        numbers = ((numbers << 1) ^ (numbers >> bits)).view(f"<u{numbers.itemsize}")
    planes = numbers.view(np.uint8).reshape(-1, numbers.itemsize).T
    frames = [zstandard.ZstdCompressor(level=3).compress(plane.tobytes()) for plane in planes]
    return struct.pack(f"<{len(frames)}I", *map(len, frames)) + b"".join(frames)


def _from_zstd(data: memoryview, into: Array) -> None:
    """Fill the columns of ``into`` [count, planes] of bytes, a plane at a time."""
    if zstandard is None:
        raise WireError("the message was packed by zstandard, which is not installed here")
    count, planes = into.shape
    lengths, at = struct.unpack_from(f"<{planes}I", data) if len(data) >= 4 * planes else (), 4 * planes
    if at + sum(lengths) != len(data):
        raise WireError(f"{planes} frames announced, that are not {len(data)} bytes")
    for plane, length in enumerate(lengths):
        frame, at = data[at : at + length], at + length
        try:
            head = zstandard.get_frame_parameters(frame)
            if head.content_size != count or head.dict_id:
                raise WireError(f"{count} bytes announced, a frame of {head.content_size} found")
            plain = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise WireError(f"damaged numbers: {error}") from None
        if len(plain) != count:
            raise WireError(f"{count} bytes announced, {len(plain)} found")
        into[:, plane] = np.frombuffer(plain, np.uint8)
        del plain


Stream: TypeAlias = Callable[[], bytes]
"""Return a packed stream, when it is there."""

LONG = 1 << 16
"""Shorter streams are packed at once: to hand them over would take as long."""


@cache
def _workers(threads: int) -> ThreadPoolExecutor:
    """Return this process's packers: the same threads every time, as each keeps memory that it has used."""
    return ThreadPoolExecutor(threads)


os.register_at_fork(after_in_child=_workers.cache_clear)


class Packing:
    """Packs streams while the next tensor is read, never more tensors behind than there are threads.

    The bytes do not depend on the threads. With one of them all is packed at once.
    """

    def __init__(self, threads: int):
        self.threads = threads
        self.under_way = deque[Future[bytes]]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for future in self.under_way:
            future.cancel()

    def begin(self, pack: Callable[[Array], bytes], numbers: Array) -> Stream:
        """Begin to pack numbers."""
        if self.threads < 2 or len(numbers) < LONG:
            stream = pack(numbers)
            return lambda: stream
        while len(self.under_way) >= self.threads:
            self.under_way.popleft().result()
        self.under_way.append(future := _workers(self.threads).submit(pack, numbers))
        return future.result
