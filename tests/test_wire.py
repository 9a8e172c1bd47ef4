"""The format: exact round trips, golden bytes, and everything that is not exactly a message refused."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pcodec import ChunkConfig, standalone

from fedsieve import wire
from fedsieve.sparsity import top
from fedsieve.types import Sparse, Tree
from fedsieve.wire import WireError, decode, encode


def same(a: object, b: object) -> bool:
    if isinstance(a, Sparse):
        return isinstance(b, Sparse) and a.shape == b.shape and same(a.index, b.index) and same(a.values, b.values)
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        return a.numel() == 0 or torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return struct.pack("<d", a) == struct.pack("<d", b)  # type: ignore[arg-type]


bits = st.lists(st.integers(0, 2**32 - 1), max_size=70)
special = st.sampled_from([0, 0x80000000, 1, 0x7F800000, 0x7FC00001, 0xFFFFFFFF])


def floats(words: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.float32))


@settings(deadline=None, max_examples=300)
@given(bits, st.lists(special, max_size=20), st.integers(0, 2**70 - 1))
def test_every_bit_of_every_float_survives(words: list[int], odd: list[int], chosen: int) -> None:
    x = floats(words + odd)
    support = torch.tensor([bool(chosen >> i & 1) for i in range(len(x))], dtype=torch.bool)
    tree: dict[str, object] = {"dense": x, "sparse": Sparse.of(x, support), "n": 0.1, "deeper": {"x": x.view(1, -1)}}
    assert same(tree, decode(encode(tree)))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", wire.TYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 3, 5)])
def test_every_type_and_shape_survives(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (torch.randn(shape) * 3).to(dtype)
    assert same({"x": x}, decode(encode({"x": x})))


@pytest.mark.parametrize("density", [0.0, 0.001, 0.05, 0.1, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("numel", [1, 7, 64, 1000, 65537])
def test_sparse_tensors_survive_at_every_density(numel: int, density: float) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    sparse = Sparse.of(x, top(x, density))
    assert same({"x": sparse}, decode(encode({"x": sparse})))


@pytest.mark.parametrize("numel", [0, 1023, 1024, 5000, 300_000])
def test_long_vectors_survive_and_are_packed(numel: int) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel)) / 50
    x[: numel // 7] = floats([0, 0x80000000, 1, 0x7F800000, 0x7FC00001, 0xFFFFFFFF] * numel)[: numel // 7]
    message = encode({"x": x})
    assert same({"x": x}, decode(message))
    assert (len(message) < 3.8 * numel) == (numel >= wire.LONG)


@pytest.mark.parametrize(
    "x", [torch.zeros(3_000_000), torch.arange(2048.0), torch.rand(2048) > 0.5, torch.ones(9, 2048)]
)
def test_vectors_that_are_nothing_like_weights_survive(x: torch.Tensor) -> None:
    assert same({"x": x}, decode(encode({"x": x})))


def test_noise_is_sent_as_it_is() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint64).astype(np.uint32)
    assert len(encode({"x": torch.from_numpy(words.view(np.float32))})) == 4 * 4096 + 4 + 4 + 3 + 1 + 2 + 4


def test_an_explicit_zero_is_a_value() -> None:
    sparse = Sparse.of(torch.tensor([0.0, -0.0, 1.0]), torch.tensor([True, True, False]))
    assert same(decode(encode({"x": sparse}))["x"], sparse)


def test_positions_cost_what_the_docstring_says_and_about_their_entropy() -> None:
    x = torch.randn(1 << 18, generator=torch.Generator().manual_seed(1))
    for q in (0.3, 0.1, 0.05, 0.01):
        sparse = Sparse.of(x, torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < q)
        p = len(sparse.index) / len(x)
        entropy = len(x) * -(p * np.log2(p) + (1 - p) * np.log2(1 - p)) / 8
        positions = len(encode({"x": sparse})) - 4 * len(sparse.index)
        assert positions <= 1.02 * entropy + 64


X = struct.pack("<H", 1) + b"x"


def one(kind: int, body: bytes = b"") -> bytes:
    """A message of one entry, called x."""
    return b"FSV1" + struct.pack("<IB", 1, kind) + X + body


FOUR = struct.pack("<f", 1.0)


def test_golden_bytes() -> None:
    tree: Tree = {
        "n": 2.0,
        "w": torch.tensor([[1.0, -0.0]]),
        "s": Sparse(torch.tensor([1.0]), torch.tensor([2]), (3,)),
        "t": {},
    }
    wanted = (
        b"FSV1" + struct.pack("<I", 4)
        + b"\x01" + struct.pack("<H", 1) + b"n" + struct.pack("<d", 2.0)
        + b"\x02" + struct.pack("<H", 1) + b"w" + b"\x00\x02" + struct.pack("<II", 1, 2) + struct.pack("<ff", 1, -0.0)
        + b"\x03" + struct.pack("<H", 1) + b"s" + b"\x00\x01" + struct.pack("<II", 3, 1) + b"\x20" + FOUR
        + b"\x00" + struct.pack("<H", 1) + b"t" + struct.pack("<I", 0)
    )  # fmt: skip
    assert encode(tree) == wanted


def gaps(*values: int) -> bytes:
    packed = bytes(standalone.simple_compress(np.array(values, dtype=np.uint32), ChunkConfig()))
    return struct.pack("<I", len(packed)) + packed


def sparse(kind: int, numel: int, nnz: int, positions: bytes, values: bytes) -> bytes:
    return one(kind, b"\x00\x01") + struct.pack("<II", numel, nnz) + positions + values


def vector(numel: int, packed: bytes, kind: bytes = b"\x00\x01") -> bytes:
    return one(5, kind + struct.pack(f"<{kind[1]}I", *[numel] * kind[1])) + packed


def floats_packed(n: int) -> bytes:
    packed = bytes(standalone.simple_compress(np.zeros(n, dtype=np.float32), ChunkConfig()))
    return struct.pack("<I", len(packed)) + packed


MALFORMED = {
    "fewer values than announced": vector(5, floats_packed(4)),
    "more values than announced": vector(3, floats_packed(4)),
    "values that are noise": vector(4, struct.pack("<I", 9) + b"not pcode"),
    "values of another type": vector(4, gaps(0, 1, 2, 3)),
    "a packed vector of int64": vector(4, floats_packed(4), b"\x04\x01"),
    "a packed matrix": vector(2, floats_packed(4), b"\x00\x02"),
    "more values than any frame holds": vector(2**32 - 1, floats_packed(4)),
    "nothing at all": b"",
    "other magic": b"FSV2" + one(1, bytes(8))[4:],
    "bytes after the end": one(1, bytes(8)) + b"\x00",
    "unknown kind": one(9),
    "unknown type": one(2, b"\x63\x00"),
    "a name that is not UTF-8": b"FSV1" + struct.pack("<IBH", 1, 1, 1) + b"\xff" + bytes(8),
    "a name twice": b"FSV1" + struct.pack("<I", 2) + 2 * (b"\x01" + X + bytes(8)),
    "a boolean of 2": one(2, b"\x07\x01") + struct.pack("<I", 1) + b"\x02",
    "more entries than bytes": b"FSV1" + struct.pack("<I", 2**32 - 1),
    "a shape that overflows": one(2, b"\x00\x04") + struct.pack("<IIII", *[2**32 - 1] * 4),
    "a shape that overflows though it is empty": one(2, b"\x00\x04") + struct.pack("<IIII", 0, *[2**32 - 1] * 3),
    "trees too deep": b"FSV1" + (struct.pack("<IB", 1, 0) + X) * 9 + struct.pack("<I", 0),
    "more positions than elements": sparse(3, 2, 3, b"\xe0", 3 * FOUR),
    "more positions than bytes": sparse(4, 2**32 - 1, 2**31, gaps(0), FOUR),
    "fewer bits than announced": sparse(3, 8, 2, b"\x80", 2 * FOUR),
    "bits beyond the last element": sparse(3, 3, 1, b"\x01", FOUR),
    "fewer gaps than announced": sparse(4, 9, 3, gaps(0, 1), 3 * FOUR),
    "more gaps than announced": sparse(4, 9, 1, gaps(0, 1), FOUR),
    "a position out of range": sparse(4, 9, 2, gaps(0, 8), 2 * FOUR),
    "gaps that add up past 2^32": sparse(4, 9, 3, gaps(2**32 - 1, 2**32 - 1, 0), 3 * FOUR),
    "gaps that are noise": sparse(4, 9, 1, struct.pack("<I", 9) + b"not pcodec"[:9], FOUR),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_refused(name: str) -> None:
    with pytest.raises(WireError):
        decode(MALFORMED[name])


@pytest.fixture(scope="module")
def message() -> bytes:
    x = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    return encode(
        {"a": Sparse.of(x, top(x, 0.05)), "b": {"c": x[:9], "d": 3.0}, "e": Sparse.of(x[:9], x[:9] > 0), "f": x}
    )


def test_a_message_cut_anywhere_is_refused(message: bytes) -> None:
    for end in range(len(message)):
        with pytest.raises(WireError):
            decode(message[:end])


def test_a_damaged_message_is_refused_or_is_another_message(message: bytes) -> None:
    generator = np.random.default_rng(0)
    for _ in range(5000):
        damaged = bytearray(message)
        for at in generator.integers(0, len(message), generator.integers(1, 4)):
            damaged[at] = generator.integers(0, 256)
        try:
            tree = decode(bytes(damaged))
        except WireError:
            continue
        for value in tree.values():
            if isinstance(value, Sparse):
                assert len(value.index) == len(value.values)
                assert (value.index.diff() > 0).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"x": torch.zeros(2, dtype=torch.complex64)},
        {"x": Sparse(torch.ones(2), torch.tensor([1, 1]), (4,))},
        {"x": Sparse(torch.ones(2), torch.tensor([1, 4]), (4,))},
        {"x": Sparse(torch.ones(2), torch.tensor([-1, 1]), (4,))},
    ],
    ids=["complex", "repeated", "out of range", "negative"],
)
def test_what_cannot_be_sent_is_refused(wrong: Tree) -> None:
    with pytest.raises(WireError):
        encode(wrong)
