"""Everything that is not exactly a message is refused, with WireError and nothing else: a named test for every rule."""

import struct
import tracemalloc

import numpy as np
import pytest
import torch
import zstandard

from fedsieve.types import Sparse
from fedsieve.wire import Known, Manifest, WireError, decode, encode
from fedsieve.wire.known import DIGEST
from fedsieve.wire.streams import pack
from messages import GOLDEN, ONE, framed, golden, leaf, message, mixed, named, stream, varint

X = mixed(300)
MASK = torch.arange(300) % 3 == 0
MANIFEST = Manifest.of({"x": X, "y": X.view(20, 15)})
KNOWN = Known(MANIFEST, {"x": X}, {"x": MASK})
PLAIN = Known(MANIFEST)
LEVEL = Known(Manifest.of({"x": torch.ones(300_000)}), {"x": torch.ones(300_000)})
INF, NAN = struct.pack("<f", np.inf), struct.pack("<f", np.nan)
DENSE, SPARSE = 2, 3
ALL, MASKED, GAPS, CHANGES, RANKED = range(5)
TYPED, SIGNED, UNSIGNED, DISTANCE, BF16, BF16_UNSIGNED, INT8, INT4, BF16_DISTANCE = range(9)


def known(plan: bytes, streams: bytes = b"", pad: bytes = b"") -> bytes:
    return message(plan, streams, pad, 3, MANIFEST.digest + KNOWN.digest)


def plain(plan: bytes, streams: bytes = b"", pad: bytes = b"") -> bytes:
    return message(plan, streams, pad, 1, MANIFEST.digest)


def raw(*values: float) -> bytes:
    return stream(values, "<f4")


def gaps(values: list[int], numel: int = 9, way: int = 0, count: int | None = None, after: bytes = b"") -> bytes:
    """A sparse tensor of ones at the positions that the gaps tell of."""
    told = varint(len(values) if count is None else count)
    ones = stream([1.0] * (len(values) if count is None else count), "<f4")
    return message(leaf(SPARSE, (numel,), TYPED, GAPS, told), stream(values, "<u4", way) + ones + after)


def in_units(shape: tuple[int, ...], unit: int, count: int, gaps: list[int]) -> bytes:
    """A sparse tensor of ones in units of successive rows, at the units that the gaps tell of."""
    plan = leaf(SPARSE, shape, TYPED, GAPS + 3, varint(count) + varint(unit) + varint(len(gaps)))
    told = stream(gaps, "<u4") if gaps else b""
    return message(plan, told + stream([1.0] * count, "<f4"))


def flipped(way: int, count: int, changed: int, flips: list[int], edge: int = 2024) -> bytes:
    """A sparse x of ones against the base, of 300 elements."""
    about = varint(edge) if way == RANKED else b""
    plan = leaf(SPARSE, (300,), TYPED, way, varint(count) + varint(changed) + about)
    told = stream(flips, "<u4") if flips else b""
    return known(plan, told + stream([1.0] * count, "<f4"))


def zstd(content: bytes, **how: bool) -> bytes:
    """Four planes of floats, each a frame."""
    size = len(content) // 4
    return planes(*(zstandard.ZstdCompressor(**how).compress(content[i * size : (i + 1) * size]) for i in range(4)))


def planes(*frames: bytes) -> bytes:
    return framed(struct.pack(f"<{len(frames)}I", *map(len, frames)) + b"".join(frames), 2)


BOMB = zstandard.ZstdCompressor().compress(bytes(1 << 20))
CLAIM = bytes.fromhex("28b52ffd") + b"\xe0" + struct.pack("<Q", 2**40) + b"\x01\0\0"
ZERO = zstandard.ZstdCompressor().compress(bytes(64))
PLANES = np.array([1.0] * 64, "<f4").view(np.uint8).reshape(64, 4).T.tobytes()
LARGE = leaf(DENSE, (3000,))[1:]
DOUBLES = stream(X[:64].double().numpy(), "<f8", 1)
MANY = [i * i % 251 for i in range(300)]
FRAME = pack(np.ones(64, "<f4"), "pcodec")[1]
FLOATS = leaf(DENSE, (2,))
SIXTY_FOUR = leaf(DENSE, (64,))

REFUSED: dict[str, tuple[bytes, Known | None, str]] = {
    # the head
    "nothing at all": (b"", None, "ends early"),
    "another magic": (b"ABCD" + message(varint(0))[4:], None, "not a FedSieve message"),
    "version 1": (b"FSV1" + bytes(4), None, "an earlier FedSieve's"),
    "version 2": (b"FSV2" + message(varint(0))[4:], None, "an earlier FedSieve's"),
    "a version to come": (b"FSV4" + message(varint(0))[4:], None, "not a FedSieve message"),
    "unknown flags": (message(varint(0), flags=8), None, "unknown flags 8"),
    "a manifest that the receiver lacks": (plain(varint(0)), None, "knows the model's manifest"),
    "no manifest though the receiver has one": (message(varint(0)), PLAIN, "no manifest"),
    "another manifest": (message(varint(0), flags=1, digests=bytes(DIGEST)), PLAIN, "its manifest differs"),
    "a base that the receiver lacks": (known(varint(0)), PLAIN, "a base that is not known here"),
    "no base though the receiver has one": (plain(varint(0)), KNOWN, "no base"),
    "another base": (message(varint(0), flags=3, digests=MANIFEST.digest + bytes(DIGEST)), KNOWN, "another base"),
    "digests cut": (message(varint(0), flags=1)[:12], PLAIN, "ends early"),
    # lengths
    "a plan longer than the message": (b"FSV3\0" + struct.pack("<II", 2**32 - 1, 0), None, "a plan of 4294967295"),
    "more padding than bytes": (b"FSV3\0" + struct.pack("<II", 1, 2**32 - 1) + b"\0", None, "bytes of padding"),
    "padding that is not zero": (message(varint(0), pad=b"\1"), None, "not zero"),
    "padding that nothing asks for": (message(varint(0), pad=b"\0"), None, "where others are due"),
    "bytes after the plan": (message(varint(0) + b"\0"), None, "after the end of the plan"),
    "bytes after the message": (message(FLOATS, raw(1, 2) + b"\0"), None, "after the end of the message"),
    "a number of ten groups": (message(b"\xff" * 9 + b"\1"), None, "beyond 2\\^63"),
    "a number longer than it needs to be": (message(b"\x80\0"), None, "more groups than it needs"),
    # entries
    "more entries than bytes": (message(varint(2000)), None, "ends early"),
    "unknown kind": (message(varint(1) + named(16) + bytes(8)), None, "unknown kind 16"),
    "a name that is not UTF-8": (message(varint(1) + named(1, b"\xff") + bytes(8)), None, "not UTF-8"),
    "a name twice": (message(varint(2) + 2 * (named(1) + bytes(8))), None, "'x' comes twice"),
    "the manifest's name and the same written out": (
        plain(varint(2) + b"\5" + bytes(8) + named(1) + bytes(8)), PLAIN, "'x' comes twice"),
    "a name longer than the plan": (message(varint(1) + b"\1\0" + varint(4000)), None, "ends early"),
    "a name longer than any": (message(varint(1) + b"\1\0" + varint(4097) + bytes(5000)), None, "4096 are allowed"),
    "more entries than a message may have": (message(varint(2**40)), None, "entries announced, 4096 more are"),
    "more entries than a model justifies": (
        plain(varint(69) + b"".join(named(1, b"%d" % i) + bytes(8) for i in range(69))), PLAIN, "69 entries announced"),
    "more entries than a model justifies, tree by tree": (
        plain(varint(35) + b"".join(named(0, b"%d" % i) + varint(1) + named(1) + bytes(8) for i in range(35))), PLAIN,
        "1 entries announced, 0 more are allowed"),
    "more entries, all of them empty tensors": (
        message(varint(5000) + b"".join(b"\2\0\2" + struct.pack("<H", i) + b"\0\1\0\0" for i in range(5000))), None,
        "5000 entries announced"),
    "a name by number without a manifest": (message(varint(1) + b"\1\1" + bytes(8)), None, "a manifest of 0"),
    "a name beyond the manifest": (plain(varint(1) + b"\1\3" + bytes(8)), PLAIN, "name 2 of a manifest of 2"),
    "a name after the manifest's last": (
        plain(varint(2) + b"\1\2" + bytes(8) + b"\5" + bytes(8)), PLAIN, "name 2 of a manifest of 2"),
    "a known shape of an unknown name": (plain(varint(1) + named(DENSE + 8, b"z") + b"\0"), PLAIN, "not known"),
    "a number with a shape": (plain(varint(1) + b"\x0d" + bytes(8)), PLAIN, "with a tensor's shape"),
    "trees too deep": (message((varint(1) + named(0)) * 8 + varint(0)), None, "nest deeper than 8"),
    "a number that is not finite": (plain(varint(1) + named(1) + struct.pack("<d", np.nan)), PLAIN, "not finite"),
    "a number cut": (message(varint(1) + named(1) + bytes(7)), None, "ends early"),
    # types and shapes
    "unknown type": (message(leaf(DENSE, (2,), dtype=8), raw(1, 2)), None, "unknown type 8"),
    "a shape that overflows": (message(leaf(DENSE, (2**32,) * 4), b""), None, "no tensor has the shape"),
    "a shape that overflows though it is empty": (message(leaf(DENSE, (0, 2**62, 2**62))), None, "no tensor has"),
    "more dimensions than bytes": (message(varint(1) + named(DENSE) + b"\0\x40"), None, "ends early"),
    "more dimensions than any": (message(varint(1) + named(DENSE) + b"\0\x41" + 65 * b"\1"), None, "65 dimensions"),
    "positions of one row each": (in_units((4, 3), 1, 2, [0]), None, "shared by 1 rows"),
    "positions of too many rows": (in_units((4, 3), 129, 12, [0]), None, "shared by 129 rows"),
    "positions of rows that there are not": (in_units((0, 3), 2, 0, []), None, "shared by 2 rows"),
    "positions of a number's rows": (in_units((), 2, 1, [0]), None, "shared by 2 rows"),
    "more units than there are": (in_units((5, 3), 2, 15, [0] * 10), None, "10 units announced, 9 are there"),
    "a unit beyond the last": (in_units((5, 3), 2, 1, [9]), None, "beyond the last of 9"),
    "units of fewer elements": (in_units((5, 3), 2, 1, [0]), None, "1 positions announced, 2 found"),
    "units of more elements": (in_units((5, 3), 2, 4, [5, 2]), None, "4 positions announced, 3 found"),
    "units against a base that is not there": (
        plain(leaf(SPARSE, (20, 15), TYPED, CHANGES + 3, bytes([2, 2, 1, 0]))), PLAIN, "no base of 'x'"),
    "more flips than units": (
        known(leaf(SPARSE, (300, 1), TYPED, CHANGES + 3, bytes([2, 2, 1]) + varint(151))), KNOWN, "151 changes"),
    "flips of units that come to another number": (
        known(leaf(SPARSE, (300, 1), TYPED, CHANGES + 3, bytes([4, 2, 2, 1])), stream([0], "<u4") + raw(1, 1, 1, 1)),
        KNOWN, "2 positions announced, 149 found"),
    "unknown mode of values": (message(leaf(DENSE, (2,), 9), raw(1, 2)), None, "mode 9"),
    "a mode for float32 with int64": (message(leaf(DENSE, (2,), SIGNED, dtype=4)), None, "in a mode for float32"),
    # what is announced
    "a dense tensor that no byte justifies": (message(leaf(DENSE, (2**40,))), None, "bytes of tensors announced"),
    "a sparse tensor that no byte justifies": (
        message(leaf(SPARSE, (2**31,), TYPED, GAPS, varint(2**30))), None, "bytes of tensors announced"),
    "the model twice": (
        plain(varint(2) + LARGE + LARGE.replace(b"x", b"z")), PLAIN, "tensors announced"),
    "an order for each of many empty tensors": (
        known(varint(30) + b"".join(named(0, bytes([97 + i])) + leaf(SPARSE, (300,), TYPED, RANKED, b"\0\0\0")
                                    for i in range(30))), KNOWN, "9000 bytes of tensors announced"),
    "padding one byte short": (
        message(leaf(DENSE, (40, 1000), UNSIGNED, GAPS, varint(0)), pad=bytes(131)), None, "announced|due"),
    "more positions than elements": (gaps([0] * 10), None, "10 positions announced in 9"),
    # positions
    "a position out of range": (gaps([0, 8]), None, "beyond the last of 9"),
    "gaps that add up past 2^32": (gaps([2**32 - 1, 2**32 - 1, 0]), None, "beyond the last"),
    "fewer gaps than announced": (gaps([0, 1], count=3), None, "3 numbers announced, 8 bytes"),
    "more gaps than announced": (gaps([0, 1], count=1), None, "1 numbers announced, 8 bytes"),
    "fewer packed gaps than announced": (gaps(MANY, 90_000, 1, count=500), None, "damaged|500 numbers"),
    "more packed gaps than announced": (gaps(MANY, 90_000, 1, count=100), None, "bytes after 100 numbers"),
    "no mask": (plain(leaf(DENSE, (300,), TYPED, MASKED), b""), PLAIN, "no mask of 'x'"),
    "a mask of another size": (known(leaf(DENSE, (299,), TYPED, MASKED)), KNOWN, "no mask of 'x'"),
    "changes against no base": (
        plain(leaf(SPARSE, (300,), TYPED, CHANGES, b"\0\0")), PLAIN, "no base of 'x'"),
    "changes against a base of another size": (
        known(leaf(SPARSE, (299,), TYPED, CHANGES, b"\0\0")), KNOWN, "no base of 'x'"),
    "more changes than elements": (flipped(CHANGES, 0, 301, []), KNOWN, "301 changes announced"),
    "changes that leave fewer positions": (flipped(CHANGES, 300, 1, [4]), KNOWN, "300 positions announced, 299"),
    "ranked flips that leave fewer positions": (flipped(RANKED, 9, 1, [4]), KNOWN, "9 positions announced, 8"),
    "a change out of range": (flipped(CHANGES, 299, 1, [300]), KNOWN, "beyond the last of 300"),
    "a ranked flip out of range": (flipped(RANKED, 9, 2, [0, 299]), KNOWN, "beyond the last of 300"),
    "an edge beyond the last step": (flipped(RANKED, 9, 0, [], 4096), KNOWN, "an edge at step 4096 of 4095"),
    "an edge that leaves most of a large tensor likely": (
        message(leaf(SPARSE, (300_000,), TYPED, RANKED, varint(1) + varint(0) + varint(0)), raw(1),
                flags=3, digests=LEVEL.manifest.digest + LEVEL.digest), LEVEL, "too many elements of 'x' above"),
    # values
    "fewer values than announced": (message(FLOATS, raw(1)), None, "2 numbers announced, 4 bytes"),
    "more values than announced": (message(FLOATS, raw(1, 2, 3)), None, "2 numbers announced, 12 bytes"),
    "a stream longer than the message": (message(FLOATS, varint(4 * 2**40) + raw(1)[1:]), None, "ends early"),
    "no stream": (message(FLOATS), None, "ends early"),
    "no stream of a second kind": (
        message(varint(2) + leaf(DENSE, (1,))[1:] + leaf(DENSE, (1,))[1:].replace(b"x", b"y"), raw(1), flags=4), None,
        "ends early"),
    "a stream of two kinds at once": (
        message(varint(2) + leaf(DENSE, (1,))[1:] + leaf(DENSE, (1,))[1:].replace(b"x", b"y"), raw(1, 2), flags=4),
        None, "1 numbers announced, 8 bytes|ends early"),
    "values of another width": (message(SIXTY_FOUR, DOUBLES), None, "damaged|after 64"),
    "values that are noise": (message(SIXTY_FOUR, framed(b"not a frame of pcodec", 1)), None, "damaged numbers"),
    "bytes for floats": (message(FLOATS, stream([1, 2], "<u1", 3)), None, "2 bytes announced"),
    "a frame with more behind it": (
        message(SIXTY_FOUR, framed(FRAME + b"junk", 1)), None, "4 bytes after 64 numbers"),
    "a zstd frame that claims 2^40 bytes": (
        message(SIXTY_FOUR, planes(CLAIM, ZERO, ZERO, ZERO)), None, "64 bytes announced"),
    "a zstd frame that holds a megabyte": (
        message(SIXTY_FOUR, planes(BOMB, ZERO, ZERO, ZERO)), None, "a frame of 1048576"),
    "a zstd frame that says nothing of its size": (
        message(SIXTY_FOUR, zstd(PLANES, write_content_size=False)), None, "64 bytes announced"),
    "a zstd frame with more behind it": (
        message(SIXTY_FOUR, planes(ZERO + b"junk", ZERO, ZERO, ZERO)), None, "damaged"),
    "a zstd frame cut": (
        message(SIXTY_FOUR, planes(ZERO[:-3], ZERO, ZERO, ZERO)), None, "damaged|announced"),
    "fewer frames than planes": (message(SIXTY_FOUR, planes(ZERO, ZERO, ZERO)), None, "4 frames announced"),
    "more frames than planes": (message(SIXTY_FOUR, planes(*5 * [ZERO])), None, "4 frames announced"),
    "zstd noise": (message(SIXTY_FOUR, planes(b"not a frame", ZERO, ZERO, ZERO)), None, "damaged numbers"),
    "a stream that is longer than its numbers": (
        message(SIXTY_FOUR, framed(FRAME + bytes(300), 1)), None, "64 numbers announced, 3.. bytes found"),
    "a magnitude with a sign": (
        message(leaf(DENSE, (1,), UNSIGNED), stream([2**31], "<u4")), None, "a magnitude with a sign"),
    "a bf16 magnitude with a sign": (
        message(leaf(DENSE, (1,), BF16_UNSIGNED), stream([2**15], "<u2")), None, "a magnitude with a sign"),
    "signs cut": (message(leaf(DENSE, (1,), SIGNED), stream([1], "<u4")), None, "ends early"),
    "a sign beyond the last": (
        message(leaf(DENSE, (1,), SIGNED), stream([1], "<u4") + b"\2"), None, "bits set beyond"),
    "a distance to no base": (plain(leaf(DENSE, (300,), DISTANCE)), PLAIN, "no base of 'x'"),
    "a bf16 distance to no base": (plain(leaf(DENSE, (300,), BF16_DISTANCE)), PLAIN, "no base of 'x'"),
    "a distance to a base of another size": (known(leaf(DENSE, (299,), DISTANCE)), KNOWN, "no base of 'x'"),
    "values alone that are not as many as the mask's": (known(leaf(DENSE, (99,), DISTANCE)), KNOWN, "no base of 'x'"),
    "a multiple beyond 127": (
        message(leaf(DENSE, (1,), INT8, told=ONE), stream([255], "<u2")), None, "beyond 127"),
    "a multiple beyond 7": (message(leaf(DENSE, (1,), INT4, told=ONE), stream([15], "<u2")), None, "beyond 7"),
    "a scale of infinity": (message(leaf(DENSE, (1,), INT8, told=INF), stream([1], "<u2")), None, "a scale"),
    "a scale of NaN": (message(leaf(DENSE, (1,), INT8, told=NAN), stream([1], "<u2")), None, "a scale"),
    "a negative scale": (
        message(leaf(DENSE, (1,), INT8, told=struct.pack("<f", -1)), stream([1], "<u2")), None, "a scale"),
    "multiples beyond the largest float": (
        message(leaf(DENSE, (1,), INT8, told=struct.pack("<f", 3e38)), stream([8], "<u2")), None, "the largest float"),
    "a scale cut": (message(leaf(DENSE, (1,), INT8, told=b"\0")), None, "ends early"),
    "a byte beyond 255": (message(leaf(DENSE, (1,), dtype=6), stream([256], "<u2")), None, "beyond 255"),
    "NaN": (plain(FLOATS, raw(1, np.nan)), PLAIN, "x is not finite"),
    "infinity": (plain(FLOATS, raw(1, np.inf)), PLAIN, "x is not finite"),
    "an infinite magnitude": (
        plain(leaf(DENSE, (1,), UNSIGNED), stream([0x7F800000], "<u4")), PLAIN, "x is not finite"),
    "an infinite bf16": (plain(leaf(DENSE, (1,), BF16_UNSIGNED), stream([0x7F80], "<u2")), PLAIN, "not finite"),
    "an infinite float64": (plain(leaf(DENSE, (1,), dtype=1), stream([np.inf], "<f8")), PLAIN, "not finite"),
    "a sparse NaN": (
        plain(leaf(SPARSE, (9,), TYPED, GAPS, b"\1"), stream([0], "<u4") + raw(np.nan)), PLAIN, "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    data, context, said = REFUSED[name]
    with pytest.raises(WireError, match=said):
        decode(data, context)


def test_there_are_many_rules() -> None:
    assert len(REFUSED) >= 80


def test_what_the_malformed_ones_were_made_from_is_taken() -> None:
    """Each refusal is for its one fault: without it the same bytes are a message."""
    ones = {"x": torch.ones(64)}
    for data, context in [
        (message(varint(0)), None),
        (plain(varint(0)), PLAIN),
        (known(varint(0)), KNOWN),
        (message(FLOATS, raw(1, np.inf)), None),
        (gaps([0, 7]), None),
        (gaps(MANY, 90_000, 1), None),
        (flipped(CHANGES, 299, 1, [299]), KNOWN),
        (flipped(RANKED, 9, 0, []), KNOWN),
        (flipped(RANKED, 1, 1, [4], 4095), KNOWN),
        (
            message(varint(2) + leaf(DENSE, (1,))[1:] + leaf(DENSE, (1,))[1:].replace(b"x", b"y"), 2 * raw(1), flags=4),
            None,
        ),
        (message(leaf(DENSE, (40, 1000), UNSIGNED, GAPS, varint(0)), pad=bytes(132)), None),
        (message(leaf(DENSE, (1,), SIGNED), stream([1], "<u4") + b"\1"), None),
        (message(leaf(DENSE, (1,), INT8, told=ONE), stream([254], "<u2")), None),
        (message(leaf(DENSE, (1,), INT4, told=ONE), stream([14], "<u2")), None),
        (message(varint(1) + b"" + (named(0) + varint(1)) * 6 + named(0) + varint(0)), None),
    ]:
        decode(data, context)
    for streams in (stream([1.0] * 64, "<f4", 1), stream([1.0] * 64, "<f4"), zstd(PLANES)):
        assert torch.equal(decode(message(SIXTY_FOUR, streams))["x"], ones["x"])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", golden())
def test_a_message_cut_anywhere_is_refused(name: str) -> None:
    _, known, _ = golden()[name]
    whole = bytes.fromhex((GOLDEN / f"{name}.hex").read_text())
    for end in range(len(whole)):
        with pytest.raises(WireError):
            decode(whole[:end], known)


@pytest.mark.parametrize("name", golden())
def test_a_message_with_more_behind_it_is_refused(name: str) -> None:
    _, known, _ = golden()[name]
    whole = bytes.fromhex((GOLDEN / f"{name}.hex").read_text())
    for more in (b"\0", b"\1", whole):
        with pytest.raises(WireError):
            decode(whole + more, known)


BOMBS = [n for n in REFUSED if any(told in n for told in ("2^40", "justifies", "megabyte", "twice"))]


@pytest.mark.parametrize("name", BOMBS)
def test_nothing_is_set_aside_for_a_bomb(name: str) -> None:
    data, context, _ = REFUSED[name]
    tracemalloc.start()
    with pytest.raises(WireError):
        decode(data, context)
    assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.stop()


def test_a_message_may_unfold_to_what_its_receiver_allows() -> None:
    zeros = {"a": torch.zeros(30_000)}
    with pytest.raises(WireError, match="120000 bytes of tensors, more than 1 times the model justifies"):
        encode(zeros, PLAIN)
    for known, size in ((Known(MANIFEST, copies=60), 200), (Known(MANIFEST, unfolds=1), 120_000)):
        message = encode(zeros, known)
        assert decode(message, known)["a"].shape == (30_000,)  # type: ignore[union-attr]
        assert len(message) < size


def test_a_message_may_have_what_entries_its_receiver_allows() -> None:
    """Without a manifest zeros justify them; with one no number of bytes does."""
    many = {f"{i}": float(i) for i in range(6000)}
    message = encode(many)
    assert decode(message) == many
    assert len(message) == 4096 * (6000 - 4096)
    with pytest.raises(WireError, match="6000 entries, more than 1 times the model justifies"):
        encode(many, PLAIN)
    assert decode(encode({f"{i}": 0.0 for i in range(68)}, PLAIN), PLAIN)


def test_a_sparse_tensor_of_more_values_than_positions_cannot_be_sent() -> None:
    with pytest.raises(WireError, match="2 values at 1 positions"):
        encode({"x": Sparse(torch.ones(2), torch.tensor([0]), (4,))})
